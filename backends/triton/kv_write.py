"""Store new keys and values in the paged cache."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from backbench.backends.triton.cache import PagedCache
from backbench.backends.triton.launch import interpreted, overlap, release_successor, wait_for_predecessor


@triton.jit
def kv_write_kernel(
    k, v, slots, k_cache, v_cache, k_stride, v_stride, block_stride,
    KV_HEADS: tl.constexpr, HEADS_PAD: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a token: k, v [T, KV_HEADS, HEAD_DIM] go to slot `slots[t]`; -1 skips."""
    release_successor(PDL)
    wait_for_predecessor(PDL)
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if slot >= 0:
        head = tl.arange(0, HEADS_PAD)[:, None]
        column = tl.arange(0, PADDED_DIM)[None, :]
        mask = (head < KV_HEADS) & (column < HEAD_DIM)
        source = head * HEAD_DIM + column
        target = (
            slot // BLOCK_SIZE * block_stride + (head * BLOCK_SIZE + slot % BLOCK_SIZE) * HEAD_DIM + column
        )
        key = tl.load(k + token * k_stride + source, mask=mask)
        tl.store(k_cache + target, key.to(k_cache.dtype.element_ty), mask=mask)
        value = tl.load(v + token * v_stride + source, mask=mask)
        tl.store(v_cache + target, value.to(v_cache.dtype.element_ty), mask=mask)


def kv_write(cache: PagedCache, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Store k, v [T, kv_heads, head_dim] (each token's heads contiguous) at `slots` i64[T]; -1 is skipped."""
    tokens, kv_heads, head_dim = k.shape
    if tokens == 0:
        return
    if interpreted(kv_write_kernel):
        # The interpreter rounds to float8 wrongly; torch does not.
        k, v = k.to(cache.k.dtype), v.to(cache.v.dtype)
    if k.stride()[1:] != (head_dim, 1):
        k = k.contiguous()
    if v.stride()[1:] != (head_dim, 1):
        v = v.contiguous()
    kv_write_kernel[(tokens,)](
        k, v, slots, cache.k, cache.v, k.stride(0), v.stride(0), cache.block_stride,
        KV_HEADS=kv_heads,
        HEADS_PAD=triton.next_power_of_2(kv_heads),
        HEAD_DIM=head_dim,
        PADDED_DIM=triton.next_power_of_2(head_dim),
        BLOCK_SIZE=cache.block_size,
        num_warps=4,
        **overlap(k),
    )  # fmt: skip
