"""Per-head norm of queries and keys and their rotary embedding (Su et al. 2021, rotate-half) in one pass."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from backbench.backends.interface import AttentionSpec, Rotation
from backbench.backends.triton.launch import overlap, release_successor, wait_for_predecessor


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
    return 1 if tokens <= 8 else min(8 if tokens > 64 else 2, triton.next_power_of_2(kv_heads))


def warps_per_program(heads: int, head_dim: int) -> int:
    """Warps that turn `heads` heads together."""
    return 1 if heads * head_dim <= 256 else 2


def rotate(
    qkv: Tensor, positions: Tensor, rotation: Rotation, spec: AttentionSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """See `Operations.rotate`. v is a view of `qkv`."""
    tokens, d = qkv.shape[0], spec.head_dim
    q = torch.empty((tokens, spec.q_heads, d), dtype=qkv.dtype, device=qkv.device)
    k = torch.empty((tokens, spec.kv_heads, d), dtype=qkv.dtype, device=qkv.device)
    v = qkv[:, (spec.q_heads + spec.kv_heads) * d :].unflatten(1, (spec.kv_heads, d))
    if tokens == 0:
        return q, k, v
    heads = heads_per_program(tokens, spec.kv_heads)
    rotate_kernel[(tokens, triton.cdiv(spec.q_heads, heads) + triton.cdiv(spec.kv_heads, heads))](
        qkv,
        positions,
        rotation.rotary.cos_sin,
        qkv if rotation.q_norm is None else rotation.q_norm,
        qkv if rotation.k_norm is None else rotation.k_norm,
        q,
        k,
        rotation.eps,
        qkv.stride(0),
        spec.q_heads,
        spec.kv_heads,
        d,
        rotation.rotary.rotary_dim // 2,
        Q_NORM=rotation.q_norm is not None,
        K_NORM=rotation.k_norm is not None,
        HEADS=heads,
        BLOCK_D=triton.next_power_of_2(d),
        num_warps=warps_per_program(heads, d),
        **overlap(qkv),
    )
    return q, k, v
