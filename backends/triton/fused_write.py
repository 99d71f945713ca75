"""Query/key norm, rotary embedding and the KV cache write in one launch."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from backbench.backends.interface import AttentionSpec, Rotation
from backbench.backends.triton.cache import PagedCache
from backbench.backends.triton.launch import overlap, release_successor, wait_for_predecessor
from backbench.backends.triton.rotary import heads_per_program, rotated_heads, warps_per_program


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
    HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program a (token, group of HEADS heads): query groups first, then keys, then values."""
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
        target = k_cache + place + head[:, None] * head_stride + d[None, :]
        # Rounded to the model's dtype first, as the separate rotate and write do.
        key = value.to(qkv.dtype.element_ty).to(k_cache.dtype.element_ty)
        tl.store(target, key, mask=live[:, None] & inside[None, :])
    else:
        head = (group - q_groups - kv_groups) * HEADS + tl.arange(0, HEADS)
        live = (head < kv_heads) & written
        mask = live[:, None] & inside[None, :]
        source += (q_heads + kv_heads) * head_dim
        copied = tl.load(source + head[:, None] * head_dim + d[None, :], mask=mask)
        target = v_cache + place + head[:, None] * head_stride + d[None, :]
        tl.store(target, copied.to(v_cache.dtype.element_ty), mask=mask)


def rotate_and_write(
    qkv: Tensor, positions: Tensor, rotation: Rotation, cache: PagedCache, slots: Tensor, spec: AttentionSpec
) -> Tensor:
    """Rotated queries [T, q_heads, head_dim] of qkv [T, (q + 2 kv) * head_dim]; K and V go to `slots`.

    positions: i64[T], also of inert tokens inside the rotary table. slots: i64[T or more]; -1 = not written.
    """
    tokens, d = qkv.shape[0], spec.head_dim
    q = torch.empty((tokens, spec.q_heads, d), dtype=qkv.dtype, device=qkv.device)
    if tokens == 0:
        return q
    qkv = qkv if qkv.stride(1) == 1 else qkv.contiguous()
    heads = heads_per_program(tokens, spec.kv_heads)
    groups = triton.cdiv(spec.q_heads, heads) + 2 * triton.cdiv(spec.kv_heads, heads)
    rotate_and_write_kernel[(tokens, groups)](
        qkv,
        positions,
        slots,
        rotation.rotary.cos_sin,
        qkv if rotation.q_norm is None else rotation.q_norm,
        qkv if rotation.k_norm is None else rotation.k_norm,
        q,
        cache.k,
        cache.v,
        rotation.eps,
        qkv.stride(0),
        spec.q_heads,
        spec.kv_heads,
        d,
        rotation.rotary.rotary_dim // 2,
        cache.block_size,
        cache.block_stride,
        cache.head_stride,
        cache.slot_stride,
        Q_NORM=rotation.q_norm is not None,
        K_NORM=rotation.k_norm is not None,
        HEADS=heads,
        BLOCK_D=triton.next_power_of_2(d),
        num_warps=warps_per_program(heads, d),
        **overlap(qkv),
    )
    return q
