"""Storing keys and values in the paged cache: alone, and in one launch with their norm and rotation."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from backbench.backends.interface import AttentionSpec, Rotation
from backbench.backends.triton.cache import PagedCache
from backbench.backends.triton.elementwise import heads_per_program, rotated_heads, warps_per_program
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
from backbench.backends.triton.rounding import to_int8

SMALLEST_SCALE = tl.constexpr(2.0**-126)
"""As `quantization.SMALLEST_SCALE`: what a head of zeros is divided by."""


@triton.jit
def head_codes(x):
    """Codes i8 of heads x f32 [heads, columns], and scales f32 [heads], as `quantization.rounded_heads`."""
    # The bits of magnitudes are ordered as these are, and NaN's lie above all others.
    largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1).to(tl.float32, bitcast=True)
    scale = tl.div_rn(largest, tl.full(largest.shape, 127.0, tl.float32))
    divisor = tl.maximum(scale, SMALLEST_SCALE)
    return to_int8(tl.div_rn(x, tl.zeros_like(x) + divisor[:, None])), scale


@triton.jit
def keep_heads(x, cache, scales, at, scale_at, mask, live, SCALED: tl.constexpr):
    """Heads x [heads, columns] go to `at` of the cache where `mask` is set.

    SCALED: as codes, and the scales of `live` heads go to `scale_at` [heads]; x is 0 past a head's end.
    """
    if SCALED:
        codes, scale = head_codes(x.to(tl.float32))
        tl.store(cache + at, codes, mask=mask)
        tl.store(scales + scale_at, scale, mask=live)
    else:
        tl.store(cache + at, x.to(cache.dtype.element_ty), mask=mask)


@triton.jit
def kv_write_kernel(
    k, v, slots, k_cache, v_cache, k_scale, v_scale, k_stride, v_stride, block_stride,
    KV_HEADS: tl.constexpr, HEADS_PAD: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, SCALED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a token: k, v [T, KV_HEADS, HEAD_DIM] go to slot `slots[t]`; -1 skips."""
    release_successor(PDL)
    wait_for_predecessor(PDL)
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if slot >= 0:
        head = tl.arange(0, HEADS_PAD)
        column = tl.arange(0, PADDED_DIM)[None, :]
        live = head < KV_HEADS
        mask = live[:, None] & (column < HEAD_DIM)
        source = head[:, None] * HEAD_DIM + column
        row = slot // BLOCK_SIZE * (block_stride // HEAD_DIM) + head * BLOCK_SIZE + slot % BLOCK_SIZE
        target = (
            slot // BLOCK_SIZE * block_stride
            + (head[:, None] * BLOCK_SIZE + slot % BLOCK_SIZE) * HEAD_DIM
            + column
        )
        key = tl.load(k + token * k_stride + source, mask=mask, other=0.0)
        keep_heads(key, k_cache, k_scale, target, row, mask, live, SCALED)
        value = tl.load(v + token * v_stride + source, mask=mask, other=0.0)
        keep_heads(value, v_cache, v_scale, target, row, mask, live, SCALED)


@cache
def _bound_write(place: Place, kv_heads: int, head_dim: int, block_size: int, scaled: bool) -> BoundKernel:
    return place.bind(
        kv_write_kernel,
        KV_HEADS=kv_heads,
        HEADS_PAD=power_of_two(kv_heads),
        HEAD_DIM=head_dim,
        PADDED_DIM=power_of_two(head_dim),
        BLOCK_SIZE=block_size,
        SCALED=scaled,
        num_warps=4,
    )


def kv_write_launch(place: Place, cache: PagedCache, k: Tensor, v: Tensor, slots: Tensor) -> Launch:
    """k, v [T, kv_heads, head_dim], each token's heads contiguous, go to `slots` i64[T]."""
    tokens, kv_heads, head_dim = k.shape
    bound = _bound_write(place, kv_heads, head_dim, cache.block_size, cache.scaled)
    arguments = (k, v, slots, *cache.arguments(), k.stride(0), v.stride(0), cache.block_stride)
    return Launch(bound, (tokens, 1, 1), arguments)


def kv_write(cache: PagedCache, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Store k, v [T, kv_heads, head_dim] (each token's heads contiguous) at `slots` i64[T]; -1 is skipped."""
    tokens, _, head_dim = k.shape
    if tokens == 0:
        return
    place = place_of(k.device)
    if place.interpreted and not cache.scaled:
        # The interpreter rounds to float8 wrongly; torch does not.
        k, v = k.to(cache.k.dtype), v.to(cache.v.dtype)
    if k.stride()[1:] != (head_dim, 1):
        k = k.contiguous()
    if v.stride()[1:] != (head_dim, 1):
        v = v.contiguous()
    kv_write_launch(place, cache, k, v, slots).start()


@triton.jit
def rotate_and_write_kernel(
    qkv,
    positions,
    slots,
    cos_sin,
    q_weight,
    k_weight,
    q_out,
    k_cache,
    v_cache,
    k_scale,
    v_scale,
    eps,
    qkv_stride,
    q_heads,
    kv_heads,
    head_dim,
    half,
    block_size,
    block_stride,
    head_stride,
    slot_stride,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    SCALED: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program a (token, group of HEADS heads): query groups first, then keys, then values.

    SCALED: the cache is int8, with scales f32 [blocks, kv_heads, block_size].
    """
    release_successor(PDL)
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    q_groups = tl.cdiv(q_heads, HEADS)
    kv_groups = tl.cdiv(kv_heads, HEADS)
    d = tl.arange(0, BLOCK_D)
    inside = d < head_dim
    wait_for_predecessor(PDL)
    source = qkv + token * qkv_stride
    angles = cos_sin + tl.load(positions + token).to(tl.int64) * (2 * half)
    slot = tl.load(slots + token).to(tl.int64)
    written = slot >= 0
    slot = tl.maximum(slot, 0)
    place = (slot // block_size) * block_stride + (slot % block_size) * slot_stride
    if group < q_groups:
        head = group * HEADS + tl.arange(0, HEADS)
        live = head < q_heads
        value = rotated_heads(source, head, live, q_weight, angles, eps, head_dim, half, Q_NORM, BLOCK_D)
        target = q_out + (token * q_heads + head[:, None]) * head_dim + d[None, :]
        tl.store(target, value.to(q_out.dtype.element_ty), mask=live[:, None] & inside[None, :])
    elif group < q_groups + kv_groups:
        head = (group - q_groups) * HEADS + tl.arange(0, HEADS)
        live = (head < kv_heads) & written
        source += q_heads * head_dim
        value = rotated_heads(source, head, live, k_weight, angles, eps, head_dim, half, K_NORM, BLOCK_D)
        # Rounded to the model's dtype first, as the separate rotate and write do.
        key = value.to(qkv.dtype.element_ty)
        at, row = place + head[:, None] * head_stride + d[None, :], place // head_dim + head * block_size
        keep_heads(key, k_cache, k_scale, at, row, live[:, None] & inside[None, :], live, SCALED)
    else:
        head = (group - q_groups - kv_groups) * HEADS + tl.arange(0, HEADS)
        live = (head < kv_heads) & written
        mask = live[:, None] & inside[None, :]
        source += (q_heads + kv_heads) * head_dim
        copied = tl.load(source + head[:, None] * head_dim + d[None, :], mask=mask, other=0.0)
        at, row = place + head[:, None] * head_stride + d[None, :], place // head_dim + head * block_size
        keep_heads(copied, v_cache, v_scale, at, row, mask, live, SCALED)


@cache
def _bound_rotate_and_write(
    place: Place, q_norm: bool, k_norm: bool, heads: int, head_dim: int, scaled: bool
) -> BoundKernel:
    return place.bind(
        rotate_and_write_kernel,
        Q_NORM=q_norm,
        K_NORM=k_norm,
        SCALED=scaled,
        HEADS=heads,
        BLOCK_D=power_of_two(head_dim),
        num_warps=warps_per_program(heads, head_dim),
    )


def rotate_and_write_launch(
    place: Place,
    qkv: Tensor,
    positions: Tensor,
    rotation: Rotation,
    cache: PagedCache,
    slots: Tensor,
    spec: AttentionSpec,
    q: Tensor,
) -> Launch:
    """q [T, q_heads, head_dim] = the rotated queries of qkv; its keys and values go to `slots`."""
    tokens, q_norm, k_norm = qkv.shape[0], rotation.q_norm, rotation.k_norm
    heads = heads_per_program(tokens, spec.kv_heads)
    groups = parts(spec.q_heads, heads) + 2 * parts(spec.kv_heads, heads)
    arguments = (
        qkv,
        positions,
        slots,
        rotation.rotary.cos_sin,
        qkv if q_norm is None else q_norm,
        qkv if k_norm is None else k_norm,
        q,
        *cache.arguments(),
        rotation.eps,
        qkv.stride(0),
        spec.q_heads,
        spec.kv_heads,
        spec.head_dim,
        rotation.rotary.rotary_dim // 2,
        cache.block_size,
        cache.block_stride,
        cache.head_stride,
        cache.slot_stride,
    )
    norms = (q_norm is not None, k_norm is not None)
    bound = _bound_rotate_and_write(place, *norms, heads, spec.head_dim, cache.scaled)
    return Launch(bound, (tokens, groups, 1), arguments)


def rotate_and_write(
    qkv: Tensor, positions: Tensor, rotation: Rotation, cache: PagedCache, slots: Tensor, spec: AttentionSpec
) -> Tensor:
    """Rotated queries [T, q_heads, head_dim] of qkv [T, (q + 2 kv) * head_dim]; K and V go to `slots`.

    positions: i64[T], also of inert tokens inside the rotary table. slots: i64[T or more]; -1 = not written.
    """
    tokens = qkv.shape[0]
    q = torch.empty((tokens, spec.q_heads, spec.head_dim), dtype=qkv.dtype, device=qkv.device)
    if tokens:
        qkv = qkv if qkv.stride(1) == 1 else qkv.contiguous()
        place = place_of(qkv.device)
        rotate_and_write_launch(place, qkv, positions, rotation, cache, slots, spec, q).start()
    return q
