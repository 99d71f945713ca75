"""Launches of quantized products: rows rounded, multiplied, parts added; or the weight written out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from backbench.backends import quantization
from backbench.backends.interface import RoundedRows, Scheme
from backbench.backends.triton.byte_gemm import byte_gemm_kernel, byte_vector_kernel
from backbench.backends.triton.launch import BoundKernel, Launch, Place, parts, place_of, power_of_two
from backbench.backends.triton.packed_gemm import packed_gemm_kernel, packed_vector_kernel
from backbench.backends.triton.quantized_configs import (
    TILE,
    Kernel,
    ScaledProduct,
    Tile,
    native,
    step_of,
    whole,
)
from backbench.backends.triton.quantized_weight import (
    BF16_SCALES,
    CODES,
    ENDLESS,
    NATIVE_ACTIVATIONS,
    QuantizedWeight,
)
from backbench.backends.triton.rounding import (
    finish_kernel,
    round_rows_kernel,
    write_bytes_kernel,
    write_packed_kernel,
)
from backbench.backends.triton.tile_gemm import tile_launch, without_empty_parts

BAND = 8
"""Blocks of rows that are multiplied by a block of the weight in turn."""
FEW_ROWS = 16
"""Rows up to which what rounds them is launched for latency, not for bandwidth."""
TOPS = {"int8": 127.5, "fp8": quantization.FP8_MAX}
KINDS = {"int8": torch.int8, "fp8": quantization.FP8}


@dataclass
class Rows:
    """Rows of x as a product takes them: numbers or codes [M, K], and what they are to be multiplied by."""

    x: Tensor
    scale: Tensor | None = None
    """f32 [M] or [M, groups]."""

    @property
    def scaling(self) -> str:
        """ "none", "row" or "group"."""
        if self.scale is None:
            return "none"
        return "row" if self.scale.dim() == 1 else "group"


def rounding_launch(
    place: Place, x: Tensor, activation: str, input_scale: Tensor | None, codes: Tensor, scale: Tensor
) -> Launch:
    """Rows of x [M, K] as `codes` [M, K] with `scale` f32 [M], or [M, K / 128] in groups."""
    kind, group, scaling = quantization.ACTIVATIONS[activation]
    depth = x.shape[1]
    spans = power_of_two(parts(depth, TILE))
    # Few rows: latency counts, so many warps share a row.
    warps = min(max(spans // 2, 4), 16) if x.shape[0] <= FEW_ROWS else 4 if spans <= 64 else 8
    bound = _bound_rounding(place, scaling == "static", group is not None, TOPS[kind], spans, warps)
    given = scale if input_scale is None else input_scale
    return Launch(bound, (x.shape[0], 1, 1), (x, given, codes, scale, depth, x.stride(0)))


@cache
def _bound_rounding(
    place: Place, static: bool, grouped: bool, top: float, spans: int, warps: int
) -> BoundKernel:
    return place.bind(
        round_rows_kernel,
        STATIC=static,
        GROUPED=grouped,
        TOP=top,
        SMALLEST=quantization.SMALLEST_SCALE,
        SPANS=spans,
        SPAN=TILE,
        num_warps=warps,
    )


def rounded(x: Tensor | RoundedRows, weight: QuantizedWeight) -> Rows:
    """x as the weight's scheme rounds it, unless it is."""
    if isinstance(x, RoundedRows):
        return Rows(x.codes, x.scale)
    activation = weight.scheme.activation
    if activation is None:
        return Rows(x)
    kind, group, _ = quantization.ACTIVATIONS[activation]
    if activation not in NATIVE_ACTIVATIONS:
        return _numbers(x, activation, weight.input_scale)
    codes = torch.empty(x.shape, dtype=KINDS[kind], device=x.device)
    shape = (x.shape[0],) if group is None else (x.shape[0], parts(x.shape[1], group))
    scale = torch.empty(shape, dtype=torch.float32, device=x.device)
    rounding_launch(place_of(x.device), x, activation, weight.input_scale, codes, scale).start()
    return Rows(codes, scale)


def _numbers(x: Tensor, activation: str, input_scale: Tensor | None) -> Rows:
    """Microscaled rows as numbers, which 16-bit floats hold exactly, and NVFP4's global scale beside them."""
    codes, scale = quantization.rounded_rows(x, activation, input_scale)
    whole = None
    if quantization.ACTIVATIONS[activation][2] == "e4m3":
        assert input_scale is not None
        scale, whole = scale / input_scale, input_scale.float().expand(x.shape[0]).contiguous()
    numbers = codes.float().unflatten(1, (scale.shape[1], -1)) * scale[..., None]
    return Rows(numbers.flatten(1).to(x.dtype), whole)


def product_launches(
    place: Place, rows: Rows, weight: QuantizedWeight, bias: Tensor | None, out: Tensor, config: Kernel | Tile
) -> list[Launch]:
    """`out` [M, N] = rows [M, K] by the weight transposed, plus bias [N]: a product, and its parts' sum."""
    if isinstance(config, Tile):
        config = without_empty_parts(config, weight, place.arch)
    sums = out
    if config.split > 1:
        sums = torch.empty((config.split, *out.shape), dtype=torch.float32, device=out.device)
    if isinstance(config, Tile):
        optional = (bias is not None, weight.row_scale is not None, rows.scale is not None)
        launches = [tile_launch(place, _given(rows, weight, bias), weight, optional, sums, config)]
    else:
        build = _packed_launch if weight.packed else _byte_launch
        launches = [build(place, rows, weight, bias, sums, config)]
    if config.split > 1:
        launches.append(_finish_launch(place, rows, weight, bias, sums, out))
    return launches


def _given(rows: Rows, weight: QuantizedWeight, bias: Tensor | None) -> tuple[Tensor, ...]:
    """The operands every product kernel begins with; what is not there is not read."""
    scale = weight.scale
    optional = (weight.zero, weight.row_scale, rows.scale, bias)
    return rows.x, weight.codes, scale, *(scale if each is None else each for each in optional)


def _packed_launch(
    place: Place, rows: Rows, weight: QuantizedWeight, bias: Tensor | None, out: Tensor, config: Kernel
) -> Launch:
    count, depth = rows.x.shape
    spans, width, words = weight.codes.shape
    even = depth % (CODES * words) == 0
    single = spans <= config.spans
    optional = (bias is not None, weight.row_scale is not None, rows.scale is not None)
    fine = not whole(weight.scheme) and rows.x.dtype == torch.bfloat16
    if config.early and not (fine and weight.scale.dtype in BF16_SCALES):
        config = replace(config, early=False)
    bound = _bound_packed(place, config, weight.scheme, weight.scale_kind, words, optional, even, single)
    given = (*_given(rows, weight, bias), out)
    columns = parts(width, config.block_n)
    if config.block_m == 0:
        return Launch(bound, (columns, 1, 1), (*given, width, depth, spans))
    arguments = (
        *given,
        count,
        width,
        depth,
        spans,
        rows.x.stride(0),
        parts(spans, config.split),
        2 * place.units,
    )
    return Launch(bound, (columns, parts(count, config.block_m), config.split), arguments)


@cache
def _bound_packed(
    place: Place,
    config: Kernel,
    scheme: Scheme,
    scale_kind: str,
    words: int,
    optional: tuple[bool, bool, bool],
    even: bool,
    single: bool,
) -> BoundKernel:
    bias, row_scale, x_scale = optional
    shared: dict[str, Any] = {
        "BIAS": bias,
        "ROW_SCALE": row_scale,
        "X_SCALE": x_scale,
        "KIND": scheme.weight,
        "SCALE_KIND": scale_kind,
        "GROUP": scheme.group or 0,
        "WORDS": words,
        "BLOCK_N": config.block_n,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }
    if config.block_m == 0:
        shared["ZERO"] = scheme.zero_point
        return place.bind(packed_vector_kernel, SPANS=config.spans, SINGLE=single, **shared)
    return place.bind(
        packed_gemm_kernel,
        ZERO_GROUP=(scheme.group or ENDLESS) if scheme.zero_point else 0,
        BLOCK_M=config.block_m,
        EVEN=even,
        SWAP=config.swap,
        EARLY=config.early,
        PARTIAL=config.split > 1,
        STAGES=config.stages,
        AHEAD=config.ahead,
        PTX=place.speaks_ptx,
        WAIT=place.arch == "sm90" and config.swap,
        WIDEN=place.interpreted,
        **shared,
    )


def _byte_launch(
    place: Place, rows: Rows, weight: QuantizedWeight, bias: Tensor | None, out: Tensor, config: Kernel
) -> Launch:
    count, depth = rows.x.shape
    width = weight.n
    step = config.depth or step_of(weight.scheme, place.arch)
    chunk = step * (config.spans if config.block_m == 0 else 1)
    fits = (depth % chunk == 0, depth <= chunk)
    half = out.dtype == torch.float16 or rows.x.dtype == torch.float16
    optional = (bias is not None, weight.row_scale is not None, rows.scaling)
    layout = (weight.scale_kind, weight.scale_rows)
    bound = _bound_bytes(place, config, weight.scheme, layout, optional, fits, half)
    given = (*_given(rows, weight, bias), out)
    columns, groups = parts(width, config.block_n), weight.scale.shape[1]
    if config.block_m == 0:
        return Launch(bound, (columns, 1, 1), (*given, width, depth, groups))
    part = parts(parts(depth, step), config.split) * step
    arguments = (*given, count, width, depth, groups, rows.x.stride(0), part, 2 * place.units)
    return Launch(bound, (columns * parts(count, config.block_m), config.split, 1), arguments)


@cache
def _bound_bytes(
    place: Place,
    config: Kernel,
    scheme: Scheme,
    layout: tuple[str, int],
    optional: tuple[bool, bool, str],
    fits: tuple[bool, bool],
    half: bool,
) -> BoundKernel:
    bias, row_scale, x_scale = optional
    even, single = fits
    shared: dict[str, Any] = {
        "BIAS": bias,
        "ROW_SCALE": row_scale,
        "X_SCALE": x_scale,
        "ZERO": scheme.zero_point,
        "SCALE_KIND": layout[0],
        "GROUP": scheme.group or 0,
        "GROUP_N": layout[1],
        "BLOCK_N": config.block_n,
        "EVEN": even,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }
    if config.block_m == 0:
        return place.bind(
            byte_vector_kernel, SPAN=step_of(scheme, place.arch), SPANS=config.spans, SINGLE=single, **shared
        )
    return place.bind(
        byte_gemm_kernel,
        BLOCK_M=config.block_m,
        BLOCK_K=config.depth or step_of(scheme, place.arch),
        SWAP=config.swap,
        PARTIAL=config.split > 1,
        BAND=BAND,
        STAGES=config.stages,
        AHEAD=config.ahead,
        NATIVE=native(place.arch, scheme),
        HALF=half,
        WAIT=place.arch == "sm90" and config.swap and not native(place.arch, scheme),
        WIDEN=place.interpreted,
        **shared,
    )


def _finish_launch(
    place: Place, rows: Rows, weight: QuantizedWeight, bias: Tensor | None, sums: Tensor, out: Tensor
) -> Launch:
    count, width = out.shape
    block = 512
    channel = weight.scheme.group is None
    optional = (bias is not None, weight.row_scale is not None, rows.scaling == "row", channel)
    bound = _bound_finish(place, optional, weight.scale_kind, sums.shape[0], block)
    _, _, scale, _, row_scale, x_scale, added = _given(rows, weight, bias)
    arguments = (sums, scale, row_scale, x_scale, added, out, count, width)
    return Launch(bound, (parts(width, block), count, 1), arguments)


@cache
def _bound_finish(
    place: Place, optional: tuple[bool, bool, bool, bool], scale_kind: str, split: int, block: int
) -> BoundKernel:
    bias, row_scale, x_scale, channel = optional
    return place.bind(
        finish_kernel,
        BIAS=bias,
        ROW_SCALE=row_scale,
        X_SCALE=x_scale,
        CHANNEL=channel,
        SCALE_KIND=scale_kind,
        PARTS=split,
        BLOCK=block,
        num_warps=4,
    )


def writing_launch(place: Place, weight: QuantizedWeight, out: Tensor) -> Launch:
    """`out` [N, K]: the weight's numbers, in its stored order of columns."""
    optional = (weight.row_scale is not None, weight.zero is not None)
    bound = _bound_writing(place, weight.scheme, weight.scale_kind, weight.scale_rows, weight.words, optional)
    scale, rest = weight.scale, (weight.zero, weight.row_scale)
    given = (weight.codes, scale, *(scale if each is None else each for each in rest), out)
    if weight.packed:
        grid = (weight.codes.shape[0], parts(weight.n, 64), 1)
        return Launch(bound, grid, (*given, weight.n, weight.k))
    return Launch(bound, (weight.n, parts(weight.k, 2048), 1), (*given, weight.n, weight.k, scale.shape[1]))


@cache
def _bound_writing(
    place: Place, scheme: Scheme, scale_kind: str, scale_rows: int, words: int, optional: tuple[bool, bool]
) -> BoundKernel:
    row_scale, zero = optional
    shared: dict[str, Any] = {
        "ROW_SCALE": row_scale,
        "ZERO": zero,
        "SCALE_KIND": scale_kind,
        "GROUP": scheme.group or 0,
        "num_warps": 4,
    }
    if scheme.weight in ("int4", "fp4"):
        return place.bind(write_packed_kernel, KIND=scheme.weight, WORDS=words, BLOCK_N=64, **shared)
    return place.bind(write_bytes_kernel, GROUP_N=scale_rows, BLOCK=2048, **shared)


def multiply(
    x: Tensor | RoundedRows, weight: QuantizedWeight, config: Kernel | Tile, bias: Tensor | None = None
) -> Tensor:
    """x [M, K] by the weight transposed, plus bias [N]: [M, N] in x's dtype, by our kernels."""
    rows = rounded(x, weight)
    out = torch.empty((x.shape[0], weight.n), dtype=x.dtype, device=rows.x.device)
    for launch in product_launches(place_of(out.device), rows, weight, bias, out, config):
        launch.start()
    return out


def dequantized(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """The weight's numbers [N, K] in `dtype`, each rounded once."""
    out = torch.empty((weight.n, weight.k), dtype=dtype, device=weight.codes.device)
    writing_launch(place_of(out.device), weight, out).start()
    return out


def multiply_dequantized(
    x: Tensor | RoundedRows, weight: QuantizedWeight, bias: Tensor | None = None
) -> Tensor:
    """As `multiply`, by the vendor's library: rows and weight as numbers of x's dtype."""
    rows = rounded(x, weight)
    numbers, scale = rows.x.to(x.dtype), rows.scale
    if scale is not None and scale.dim() == 2:
        numbers = (numbers.unflatten(1, (scale.shape[1], -1)) * scale[..., None]).flatten(1).to(x.dtype)
        scale = None
    if scale is None:
        return torch.nn.functional.linear(numbers, dequantized(weight, x.dtype), bias)
    product = torch.nn.functional.linear(numbers, dequantized(weight, x.dtype)).float() * scale[:, None]
    return (product if bias is None else product + bias.float()).to(x.dtype)


def multiply_scaled(x: Tensor | RoundedRows, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """As `multiply`, by `torch._scaled_mm`."""
    rows = rounded(x, weight)
    assert rows.scale is not None
    return torch._scaled_mm(
        rows.x,
        weight.codes.T,
        scale_a=rows.scale[:, None],
        scale_b=weight.scale.T,
        bias=bias,
        out_dtype=x.dtype,
        use_fast_accum=True,
    )


def run_quantized(
    x: Tensor | RoundedRows, weight: QuantizedWeight, way: Any, bias: Tensor | None = None
) -> Tensor:
    """x [M, K] by the weight transposed, plus bias [N], in the given way."""
    if isinstance(x, Tensor):
        if weight.order is not None:
            x = x.index_select(1, weight.order)
        x = x if x.stride(1) == 1 else x.contiguous()
    if x.shape[0] == 0:
        return weight.codes.new_empty((0, weight.n), dtype=x.dtype)
    if isinstance(way, (Kernel, Tile)):
        return multiply(x, weight, way, bias)
    if isinstance(way, ScaledProduct):
        return multiply_scaled(x, weight, bias)
    return multiply_dequantized(x, weight, bias)
