"""Gathering embedding rows."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from backbench.backends.triton.launch import overlap, release_successor, wait_for_predecessor


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


def embed(ids: Tensor, table: Tensor) -> Tensor:
    """Rows `ids` i64[T] of `table` [V, H]: [T, H]. Ids are trusted to lie in [0, V)."""
    tokens, width = ids.shape[0], table.shape[1]
    out = torch.empty((tokens, width), dtype=table.dtype, device=table.device)
    if tokens == 0:
        return out
    block = min(2048, triton.next_power_of_2(width))
    embed_kernel[(tokens, triton.cdiv(width, block))](
        ids, table, out, table.stride(0), width, BLOCK=block, num_warps=4, **overlap(ids)
    )
    return out
