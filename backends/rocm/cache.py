"""The preshuffled KV cache that AITER's assembly decode kernel reads.

A lane loads 16 bytes at a time. With x = 16 / itemsize values in them: keys are
[num_blocks, kv_heads, head_dim / x, block_size, x], values
[num_blocks, kv_heads, block_size / x, head_dim, x].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LANE_BYTES = 16


@dataclass(frozen=True)
class PreshuffledCache:
    """One layer's keys and values; one spare block at the end takes the writes of slot -1."""

    keys: Tensor
    values: Tensor

    @property
    def block_size(self) -> int:
        return self.keys.shape[3]

    def live(self) -> tuple[Tensor, Tensor]:
        """Without the spare block."""
        return self.keys[:-1], self.values[:-1]

    def write(self, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """Store k, v [T, kv_heads, head_dim] at `slots` i64[T]."""
        x, size = self.keys.shape[4], self.block_size
        # Floor division and remainder send slot -1 to the last slot of the last block: the spare one.
        block, offset = slots.div(size, rounding_mode="floor"), slots.remainder(size)
        tokens, heads, width = k.shape
        self.keys[block, :, :, offset] = k.view(tokens, heads, width // x, x)
        self.values[block, :, offset // x, :, offset % x] = v

    def read(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Blocks `ids` as [n, block_size, kv_heads, head_dim] each."""
        keys = self.keys[ids].permute(0, 3, 1, 2, 4).flatten(3)
        values = self.values[ids].permute(0, 2, 4, 1, 3).flatten(1, 2)
        return keys, values


def new_cache(
    num_blocks: int, kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> PreshuffledCache:
    """A zeroed cache: slots past a sequence's end have to be finite."""
    x = LANE_BYTES // dtype.itemsize
    keys = torch.zeros((num_blocks + 1, kv_heads, head_dim // x, block_size, x), dtype=dtype, device=device)
    values = torch.zeros((num_blocks + 1, kv_heads, block_size // x, head_dim, x), dtype=dtype, device=device)
    return PreshuffledCache(keys, values)
