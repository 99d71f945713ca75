"""Norm and gate whose rows are rounded in the same launch, for a product that takes codes.

A row has one scale, so each of its programs makes the whole of it. Its numbers are those that `elementwise`
stores, in the rows' dtype, and its codes those that `rounding` makes of them.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from backbench.backends import quantization
from backbench.backends.interface import RoundedRows
from backbench.backends.triton.elementwise import MANY_ROWS, norm_warps, normed, silu, summed
from backbench.backends.triton.launch import (
    BoundKernel,
    Launch,
    Place,
    parts,
    place_of,
    power_of_two,
    release_successor,
    wait_for_predecessor,
)
from backbench.backends.triton.quantized import FEW_ROWS, KINDS, TOPS
from backbench.backends.triton.quantized_configs import TILE
from backbench.backends.triton.rounding import row_steps, store_codes

PROGRAMS = 8
"""Programs that share a row's gate where rows are few."""


@triton.jit
def rounded_norm_kernel(
    x,
    residual,
    weight,
    codes,
    scale,
    x_stride,
    width,
    eps,
    GROUPED: tl.constexpr,
    TOP: tl.constexpr,
    SMALLEST: tl.constexpr,
    SPANS: tl.constexpr,
    SPAN: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program a row: residual += x, then its norm times weight in codes [row, width] with its scale.

    GROUPED, TOP, SMALLEST, SPAN: as in `round_rows_kernel`.
    """
    release_successor(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, SPANS * SPAN)
    inside = column < width
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    wait_for_predecessor(PDL)
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    value = normed(summed(value, residual, row * width + column, inside), gain, width, eps)
    value = value.to(residual.dtype.element_ty).to(tl.float32)
    tile = tl.reshape(value, (SPANS, SPAN))
    store_codes(tile, row_steps(tile, GROUPED, TOP), codes, scale, row, 0, width, GROUPED, SMALLEST)


@triton.jit
def gated(gate_up, row, row_stride, width, first, SPANS: tl.constexpr, SPAN: tl.constexpr):
    """silu(gate) * up of columns `first` on, in the dtype of `gate_up`, as f32 [SPANS, SPAN]; else 0."""
    column = first + tl.arange(0, SPANS)[:, None] * SPAN + tl.arange(0, SPAN)[None, :]
    source = gate_up + row * row_stride + column
    gate = tl.load(source, mask=column < width, other=0.0).to(tl.float32)
    up = tl.load(source + width, mask=column < width, other=0.0).to(tl.float32)
    return (silu(gate) * up).to(gate_up.dtype.element_ty).to(tl.float32)


@triton.jit
def rounded_gate_kernel(
    gate_up,
    codes,
    scale,
    row_stride,
    width,
    GROUPED: tl.constexpr,
    TOP: tl.constexpr,
    SMALLEST: tl.constexpr,
    SPANS: tl.constexpr,
    SPAN: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """silu(gate) * up of `gate_up` [row, 2 width] in codes [row, width] with its scale, PARTS programs a row.

    Each program gates all of the row, for its scale, and rounds its own part: the division takes longest.
    GROUPED, TOP, SMALLEST, SPAN: as in `round_rows_kernel`.
    """
    release_successor(PDL)
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * (SPANS // PARTS)
    wait_for_predecessor(PDL)
    if GROUPED or PARTS == 1:
        value = gated(gate_up, row, row_stride, width, first * SPAN, SPANS // PARTS, SPAN)
        step = row_steps(value, GROUPED, TOP)
    else:
        whole = gated(gate_up, row, row_stride, width, 0, SPANS, SPAN)
        value = gated(gate_up, row, row_stride, width, first * SPAN, SPANS // PARTS, SPAN)
        step = tl.zeros((SPANS // PARTS,), tl.float32) + tl.max(row_steps(whole, False, TOP), axis=0)
    store_codes(value, step, codes, scale, row, first, width, GROUPED, SMALLEST)


def rounded_norm_launch(
    place: Place,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    activation: str,
    codes: Tensor,
    scale: Tensor,
) -> Launch:
    """`codes` [T, H] and `scale` = norm(x + residual) * weight; x [T, H] with unit column stride."""
    rows, width = x.shape
    bound = _bound_norm(place, activation, power_of_two(parts(width, TILE)), rows > MANY_ROWS)
    return Launch(bound, (rows, 1, 1), (x, residual, weight, codes, scale, x.stride(0), width, eps))


@cache
def _bound_norm(place: Place, activation: str, spans: int, many: bool) -> BoundKernel:
    warps = norm_warps(spans * TILE, many)
    return place.bind(rounded_norm_kernel, **_rounding(activation, spans), num_warps=warps)


def rounded_gate_launch(
    place: Place, gate_up: Tensor, activation: str, codes: Tensor, scale: Tensor
) -> Launch:
    """`codes` [T, F] and `scale` = silu(gate) * up of gate_up [T, 2F] with unit column stride."""
    rows, width = codes.shape
    spans = power_of_two(parts(width, TILE))
    programs = min(spans, PROGRAMS) if rows <= FEW_ROWS else 1
    bound = _bound_gate(place, activation, spans, programs)
    return Launch(bound, (rows, programs, 1), (gate_up, codes, scale, gate_up.stride(0), width))


@cache
def _bound_gate(place: Place, activation: str, spans: int, programs: int) -> BoundKernel:
    warps = min(max(spans // 4, 4), 16)
    return place.bind(rounded_gate_kernel, **_rounding(activation, spans), PARTS=programs, num_warps=warps)


def _rounding(activation: str, spans: int) -> dict[str, Any]:
    """What both kernels are told of how rows are rounded."""
    kind, group, _ = quantization.ACTIVATIONS[activation]
    return {
        "GROUPED": group is not None,
        "TOP": TOPS[kind],
        "SMALLEST": quantization.SMALLEST_SCALE,
        "SPANS": spans,
        "SPAN": TILE,
    }


def _room(rows: int, width: int, dtype: torch.dtype, activation: str, device: torch.device) -> RoundedRows:
    """Rows that are yet to be made."""
    kind, group, _ = quantization.ACTIVATIONS[activation]
    codes = torch.empty((rows, width), dtype=KINDS[kind], device=device)
    shape = (rows,) if group is None else (rows, parts(width, group))
    return RoundedRows(codes, torch.empty(shape, dtype=torch.float32, device=device), dtype)


def rounded_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, activation: str
) -> RoundedRows:
    """Norm of x + residual [T, H] in codes; `residual` keeps the sum."""
    rows, width = x.shape
    found = _room(rows, width, x.dtype, activation, x.device)
    if rows:
        x, place = x if x.stride(1) == 1 else x.contiguous(), place_of(x.device)
        rounded_norm_launch(place, x, residual, weight, eps, activation, found.codes, found.scale).start()
    return found


def rounded_gate(gate_up: Tensor, activation: str) -> RoundedRows:
    """silu(gate) * up of gate_up [T, 2F]: [T, F] in codes."""
    rows, double = gate_up.shape
    found = _room(rows, double // 2, gate_up.dtype, activation, gate_up.device)
    if rows:
        gate_up = gate_up if gate_up.stride(1) == 1 else gate_up.contiguous()
        place = place_of(gate_up.device)
        rounded_gate_launch(place, gate_up, activation, found.codes, found.scale).start()
    return found
