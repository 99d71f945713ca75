"""The paged KV cache of the Triton backend.

Layout: K and V apart, each `[num_blocks, kv_heads, block_size, head_dim]`, contiguous. One head of one
block is then one contiguous run (4 KiB for 16 keys of 128 bf16 values): a decode program reads whole
runs, a block is a box of a tensor descriptor, and the flat view `[num_blocks * kv_heads * block_size,
head_dim]` has the row stride `head_dim` for every geometry.

An int8 cache has scales in two tensors more, `[num_blocks, kv_heads, block_size]` in fp32: those of one
head of one block are one run, too (256 bytes for 64 keys), and a slot's stands where its row stands in the
flat view. They take 4 bytes beside `head_dim` codes, 3.1 % of 128. 16 bits would save half of that, but bf16
would move a head's largest number by up to half of what a code's rounding does, and fp16 has no room for the
scales of small heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PagedCache:
    """One layer's keys and values.

    Slot `s` (= block * block_size + offset) of kv head `h` starts, in elements, at
    `block * (kv_heads * block_size * head_dim) + h * (block_size * head_dim) + offset * head_dim`;
    the `head_dim` values of a slot are contiguous. All strides below follow from the shape.
    """

    k: Tensor
    """[num_blocks, kv_heads, block_size, head_dim], in the spec's `kv_dtype`."""
    v: Tensor
    """Same shape, dtype and strides as `k`."""
    k_scale: Tensor | None = None
    """f32 [num_blocks, kv_heads, block_size], contiguous, of an int8 cache; `v_scale` likewise."""
    v_scale: Tensor | None = None

    @property
    def scaled(self) -> bool:
        """True where there are scales."""
        return self.k_scale is not None

    def tensors(self) -> tuple[Tensor, ...]:
        """All that blocks are made of; each has the block first."""
        return tuple(each for each in (self.k, self.v, self.k_scale, self.v_scale) if each is not None)

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys, values and their scales as kernels take them; they look at no scale where there is none."""
        k_scale = self.k if self.k_scale is None else self.k_scale
        v_scale = self.v if self.v_scale is None else self.v_scale
        return self.k, self.v, k_scale, v_scale

    def blocks(self) -> tuple[Tensor, Tensor]:
        """Keys and values as strided views [num_blocks, block_size, kv_heads, head_dim]."""
        return self.k.transpose(1, 2), self.v.transpose(1, 2)

    @property
    def block_size(self) -> int:
        """Keys in a block."""
        return self.k.shape[2]

    @property
    def block_stride(self) -> int:
        """Elements from one block to the next: kv_heads * block_size * head_dim."""
        return self.k.stride(0)

    @property
    def head_stride(self) -> int:
        """Elements from one kv head to the next inside a block: block_size * head_dim."""
        return self.k.stride(1)

    @property
    def slot_stride(self) -> int:
        """Elements from one key to the next inside a block and head: head_dim."""
        return self.k.stride(2)


def new_cache(
    num_blocks: int, kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> PagedCache:
    """A cache of `num_blocks` blocks; its contents are arbitrary."""
    shape = (num_blocks, kv_heads, block_size, head_dim)
    k, v = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
    if dtype != torch.int8:
        return PagedCache(k, v)
    return PagedCache(k, v, *(torch.empty(shape[:3], device=device) for _ in range(2)))
