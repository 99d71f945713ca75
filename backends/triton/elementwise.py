"""The elementwise kernels: embedding, norm and residual, rotary embedding, gate.

Each `..._launch` function says how its kernel is launched; the function beside it makes room for the result
and starts it.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from backbench.backends.interface import AttentionSpec, Rotation
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

MANY_ROWS = 512
"""Rows above which a norm's launch is made for bandwidth, not for latency."""


@triton.jit
def embed_kernel(ids, table, out, table_stride, width, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One program a (token, column block)."""
    release_successor(PDL)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    wait_for_predecessor(PDL)
    row = tl.load(ids + token).to(tl.int64)
    value = tl.load(table + row * table_stride + column, mask=inside)
    tl.store(out + token * width + column, value, mask=inside)


@cache
def _bound_embed(place: Place, width: int) -> BoundKernel:
    return place.bind(embed_kernel, BLOCK=min(2048, power_of_two(width)), num_warps=4)


def embed_launch(place: Place, ids: Tensor, table: Tensor, out: Tensor) -> Launch:
    """`out` [T, H] = rows `ids` i64[T] of `table` [V, H]."""
    tokens, width = out.shape
    grid = (tokens, parts(width, 2048), 1)
    return Launch(_bound_embed(place, width), grid, (ids, table, out, table.stride(0), width))


def embed(ids: Tensor, table: Tensor) -> Tensor:
    """Rows `ids` i64[T] of `table` [V, H]: [T, H]. Ids are trusted to lie in [0, V)."""
    out = torch.empty((ids.shape[0], table.shape[1]), dtype=table.dtype, device=table.device)
    if out.shape[0]:
        embed_launch(place_of(ids.device), ids, table, out).start()
    return out


@triton.jit
def summed(value, residual, place, inside):
    """f32 value + `residual` at `place`, in the residual's dtype, which holds the sum from then on."""
    carried = tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    total = (value + carried).to(residual.dtype.element_ty)
    tl.store(residual + place, total, mask=inside)
    return total.to(tl.float32)


@triton.jit
def normed(value, gain, width, eps):
    """f32 value [BLOCK] over its root mean square, times gain; both are 0 past `width`."""
    mean_square = tl.sum(value * value, axis=0) / width
    return value * (1.0 / tl.sqrt_rn(mean_square + eps)) * gain


@triton.jit
def rms_norm_kernel(
    x,
    residual,
    weight,
    out,
    x_stride,
    width,
    eps,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program a row: out = norm(x [+ residual]) * weight; with ADD the sum replaces `residual`."""
    release_successor(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    wait_for_predecessor(PDL)
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value = summed(value, residual, row * width + column, inside)
    value = normed(value, gain, width, eps)
    tl.store(out + row * width + column, value.to(out.dtype.element_ty), mask=inside)


def norm_warps(block: int, many: bool) -> int:
    """Warps that norm a row of `block` columns.

    Few rows: latency counts, so many warps share a row. Many rows: 16 values a thread keep loads wide.
    """
    return min(max(block // (512 if many else 256), 1), 16)


@cache
def _bound_norm(place: Place, add: bool, width: int, many: bool) -> BoundKernel:
    block = power_of_two(width)
    return place.bind(rms_norm_kernel, ADD=add, BLOCK=block, num_warps=norm_warps(block, many))


def norm_launch(
    place: Place, x: Tensor, weight: Tensor, eps: float, out: Tensor, residual: Tensor | None
) -> Launch:
    """`out` [T, H] = norm(x [+ residual]) * weight; x [T, H] with unit column stride."""
    rows, width = x.shape
    bound = _bound_norm(place, residual is not None, width, rows > MANY_ROWS)
    carried = x if residual is None else residual
    return Launch(bound, (rows, 1, 1), (x, carried, weight, out, x.stride(0), width, eps))


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """Norm of x [T, H] (rows may be strided); `residual` [T, H] is summed in first and keeps the sum.

    Root-mean-square norm: Zhang & Sennrich 2019.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.shape[0]:
        x = x if x.stride(1) == 1 else x.contiguous()
        norm_launch(place_of(x.device), x, weight, eps, out, residual).start()
    return out


@triton.jit
def rotated_heads(
    source,
    head,
    live,
    weight,
    cos_sin,
    eps,
    head_dim,
    half,
    NORM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Heads at `source + head * head_dim`, normed by `weight` where NORM, rotated: f32[HEADS, BLOCK_D].

    `cos_sin` points at the token's table row: `half` cosines, then `half` sines. Dimensions past
    2 * half pass through unrotated. A dimension's partner is half a rotation away.
    """
    d = tl.arange(0, BLOCK_D)
    inside = d < head_dim
    turned = d < 2 * half
    partner = tl.where(d < half, d + half, d - half)
    angle = tl.where(d < half, d, d - half)
    base = source + head[:, None] * head_dim
    mask = live[:, None] & inside[None, :]
    partner_mask = live[:, None] & turned[None, :]
    value = tl.load(base + d[None, :], mask=mask, other=0.0).to(tl.float32)
    other = tl.load(base + partner[None, :], mask=partner_mask, other=0.0).to(tl.float32)
    if NORM:
        mean_square = tl.sum(value * value, axis=1) / head_dim
        inverse = 1.0 / tl.sqrt_rn(mean_square + eps)
        scale = tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
        partner_scale = tl.load(weight + partner, mask=turned, other=0.0).to(tl.float32)
        value = value * inverse[:, None] * scale[None, :]
        other = other * inverse[:, None] * partner_scale[None, :]
    cosine = tl.load(cos_sin + angle, mask=turned, other=1.0)
    sine = tl.load(cos_sin + half + angle, mask=turned, other=0.0)
    sine = tl.where(d < half, -sine, sine)
    return value * cosine[None, :] + other * sine[None, :]


@triton.jit
def rotate_kernel(
    qkv,
    positions,
    cos_sin,
    q_weight,
    k_weight,
    q_out,
    k_out,
    eps,
    qkv_stride,
    q_heads,
    kv_heads,
    head_dim,
    half,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program a (token, group of HEADS heads); the query groups come first, then the key groups."""
    release_successor(PDL)
    token = tl.program_id(0).to(tl.int64)
    q_groups = tl.cdiv(q_heads, HEADS)
    group = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    wait_for_predecessor(PDL)
    position = tl.load(positions + token).to(tl.int64)
    angles = cos_sin + position * (2 * half)
    source = qkv + token * qkv_stride
    if group < q_groups:
        head = group * HEADS + tl.arange(0, HEADS)
        live = head < q_heads
        value = rotated_heads(source, head, live, q_weight, angles, eps, head_dim, half, Q_NORM, BLOCK_D)
        target = q_out + (token * q_heads + head[:, None]) * head_dim + d[None, :]
        tl.store(target, value.to(q_out.dtype.element_ty), mask=live[:, None] & (d < head_dim)[None, :])
    else:
        head = (group - q_groups) * HEADS + tl.arange(0, HEADS)
        live = head < kv_heads
        source += q_heads * head_dim
        value = rotated_heads(source, head, live, k_weight, angles, eps, head_dim, half, K_NORM, BLOCK_D)
        target = k_out + (token * kv_heads + head[:, None]) * head_dim + d[None, :]
        tl.store(target, value.to(k_out.dtype.element_ty), mask=live[:, None] & (d < head_dim)[None, :])


def heads_per_program(tokens: int, kv_heads: int) -> int:
    """Heads one program turns: few when tokens are few, so that every compute unit has work."""
    return 1 if tokens <= 8 else min(8 if tokens > 64 else 2, power_of_two(kv_heads))


def warps_per_program(heads: int, head_dim: int) -> int:
    """Warps that turn `heads` heads together."""
    return 1 if heads * head_dim <= 256 else 2


@cache
def _bound_rotate(place: Place, q_norm: bool, k_norm: bool, heads: int, head_dim: int) -> BoundKernel:
    return place.bind(
        rotate_kernel,
        Q_NORM=q_norm,
        K_NORM=k_norm,
        HEADS=heads,
        BLOCK_D=power_of_two(head_dim),
        num_warps=warps_per_program(heads, head_dim),
    )


def rotate_launch(
    place: Place,
    qkv: Tensor,
    positions: Tensor,
    rotation: Rotation,
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
) -> Launch:
    """q, k [T, heads, head_dim] = the normed and rotated heads of qkv [T, (q + 2 kv) * head_dim]."""
    tokens, q_norm, k_norm = qkv.shape[0], rotation.q_norm, rotation.k_norm
    heads = heads_per_program(tokens, spec.kv_heads)
    groups = parts(spec.q_heads, heads) + parts(spec.kv_heads, heads)
    arguments = (
        qkv,
        positions,
        rotation.rotary.cos_sin,
        qkv if q_norm is None else q_norm,
        qkv if k_norm is None else k_norm,
        q,
        k,
        rotation.eps,
        qkv.stride(0),
        spec.q_heads,
        spec.kv_heads,
        spec.head_dim,
        rotation.rotary.rotary_dim // 2,
    )
    bound = _bound_rotate(place, q_norm is not None, k_norm is not None, heads, spec.head_dim)
    return Launch(bound, (tokens, groups, 1), arguments)


def rotate(
    qkv: Tensor, positions: Tensor, rotation: Rotation, spec: AttentionSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """See `Operations.rotate`. v is a view of `qkv`.

    Rotary embedding: Su et al. 2021, in the rotate-half convention.
    """
    tokens, d = qkv.shape[0], spec.head_dim
    q = torch.empty((tokens, spec.q_heads, d), dtype=qkv.dtype, device=qkv.device)
    k = torch.empty((tokens, spec.kv_heads, d), dtype=qkv.dtype, device=qkv.device)
    v = qkv[:, (spec.q_heads + spec.kv_heads) * d :].unflatten(1, (spec.kv_heads, d))
    if tokens:
        rotate_launch(place_of(qkv.device), qkv, positions, rotation, spec, q, k).start()
    return q, k, v


@triton.jit
def silu(x):
    """x * sigmoid(x) in fp32."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def gate_kernel(gate_up, out, row_stride, width, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One program a (row, column block) of the output."""
    release_successor(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    wait_for_predecessor(PDL)
    source = gate_up + row * row_stride + column
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + width, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, (silu(gate) * up).to(out.dtype.element_ty), mask=inside)


@cache
def _bound_gate(place: Place, block: int) -> BoundKernel:
    return place.bind(gate_kernel, BLOCK=block, num_warps=4 if block <= 1024 else 8)


def gate_launch(place: Place, gate_up: Tensor, out: Tensor) -> Launch:
    """`out` [T, F] = silu(gate) * up of gate_up [T, 2F] with unit column stride."""
    rows, width = out.shape
    block = min(1024 if rows <= 64 else 4096, power_of_two(width))
    grid = (rows, parts(width, block), 1)
    return Launch(_bound_gate(place, block), grid, (gate_up, out, gate_up.stride(0), width))


def gate(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of a stacked projection gate_up [T, 2F]: [T, F] in its dtype, products in fp32.

    SwiGLU: Shazeer 2020.
    """
    rows, double = gate_up.shape
    out = torch.empty((rows, double // 2), dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        gate_up = gate_up if gate_up.stride(1) == 1 else gate_up.contiguous()
        gate_launch(place_of(gate_up.device), gate_up, out).start()
    return out
