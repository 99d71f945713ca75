"""Paged attention in plain torch: one sequence at a time, as written in the textbook."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from backbench.backends.interface import (
    Attention,
    AttentionRunner,
    AttentionSpec,
    Batch,
    Device,
    GraphSupport,
)
from backbench.backends.quantization import FP8, FP8_MAX, head_numbers, rounded_heads
from backbench.errors import BackendError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
QUERY_TILE = 512
"""Query tokens whose scores are held at once: bounds the memory of a long prefill."""


@dataclass(frozen=True)
class TorchCache:
    """One layer's keys and values, [num_blocks * block_size + 1, kv_heads, head_dim] each.

    The spare last row takes the writes of slot -1, so that no write needs a mask.
    """

    keys: Tensor
    values: Tensor
    block_size: int
    key_scales: Tensor | None = None
    """f32 [num_blocks * block_size + 1, kv_heads] of an int8 cache, with the same spare row."""
    value_scales: Tensor | None = None

    def blocks(self) -> tuple[Tensor, Tensor]:
        """Keys and values as [num_blocks, block_size, kv_heads, head_dim] views."""
        return self._by_block(self.keys), self._by_block(self.values)

    def scale_blocks(self) -> tuple[Tensor, ...]:
        """Their scales as [num_blocks, block_size, kv_heads] views; empty where there are none."""
        kept = (self.key_scales, self.value_scales)
        return tuple(self._by_block(each) for each in kept if each is not None)

    def _by_block(self, rows: Tensor) -> Tensor:
        return rows[:-1].view(-1, self.block_size, *rows.shape[1:])


class TorchAttention(Attention):
    """Gathers each sequence's blocks and computes softmax(q k^T) v (Vaswani et al. 2017)."""

    name = "torch"
    cache_layout = "token rows"

    def refusals(self, spec: AttentionSpec, device: Device) -> list[str]:
        reasons = []
        if spec.dtype not in DTYPES:
            reasons.append(f"dtype {spec.dtype} is none of float32, bfloat16, float16")
        if spec.kv_dtype not in (spec.dtype, FP8, torch.int8):
            reasons.append(f"KV dtype {spec.kv_dtype} is none of {spec.dtype}, float8_e4m3fn, int8")
        if spec.q_heads % spec.kv_heads:
            reasons.append(f"{spec.q_heads} query heads do not divide among {spec.kv_heads} KV heads")
        return reasons

    def open(self, spec: AttentionSpec, device: Device) -> AttentionRunner:
        if reasons := self.refusals(spec, device):
            raise BackendError(f"torch attention cannot serve this: {'; '.join(reasons)}.")
        return TorchRunner(spec, device)


class TorchRunner(AttentionRunner):
    """Sequences are computed one by one, so nothing depends on the rest of the batch."""

    graph = GraphSupport.NEVER
    batch_invariant = True

    def __init__(self, spec: AttentionSpec, device: Device) -> None:
        self.spec = spec
        self.device = device
        self.wide = torch.promote_types(spec.dtype, torch.float32)
        """In which scores are computed."""

    def new_cache(self, num_blocks: int) -> TorchCache:
        spec = self.spec
        slots, at = num_blocks * spec.block_size + 1, self.device.torch_device
        shape = (slots, spec.kv_heads, spec.head_dim)
        keys, values = (torch.zeros(shape, dtype=spec.kv_dtype, device=at) for _ in range(2))
        if not spec.scaled:
            return TorchCache(keys, values, spec.block_size)
        scales = (torch.zeros(slots, spec.kv_heads, device=at) for _ in range(2))
        return TorchCache(keys, values, spec.block_size, *scales)

    def cache_bytes_per_block(self) -> int:
        return self.spec.block_size * self.spec.kv_bytes_per_token

    def plan(self, batch: Batch) -> Hashable:
        return (batch.num_seqs, batch.num_tokens)

    def write(self, cache: TorchCache, k: Tensor, v: Tensor, batch: Batch) -> None:
        slots = batch.slots[: k.shape[0]]
        if cache.key_scales is not None and cache.value_scales is not None:
            cache.keys[slots], cache.key_scales[slots] = rounded_heads(k)
            cache.values[slots], cache.value_scales[slots] = rounded_heads(v)
        else:
            cache.keys[slots] = self._stored(k)
            cache.values[slots] = self._stored(v)

    def _stored(self, x: Tensor) -> Tensor:
        """As a cache without scales keeps it."""
        if self.spec.kv_dtype != FP8 or x.dtype == FP8:
            return x
        return x.clamp(-FP8_MAX, FP8_MAX).to(FP8)

    def run(self, q: Tensor, cache: TorchCache, batch: Batch, out: Tensor) -> None:
        block_size = self.spec.block_size
        parts = (*cache.blocks(), *cache.scale_blocks())
        scaled = q.to(self.wide) * self.spec.scale
        starts = batch.query_start[: batch.num_seqs + 1].tolist()
        lengths = batch.seq_lens[: batch.num_seqs].tolist()
        for row, length in enumerate(lengths):
            start, end = starts[row], starts[row + 1]
            if start == end or length == 0:
                continue
            first = self._first_block(length - (end - start))
            blocks = batch.block_table[row, first : -(-length // block_size)]
            live = length - first * block_size
            k, v, *scales = (part.index_select(0, blocks).flatten(0, 1)[:live] for part in parts)
            k, v = k.to(self.spec.dtype), v.to(self.spec.dtype)
            for tile in range(start, end, QUERY_TILE):
                stop = min(tile + QUERY_TILE, end)
                visible = live - (end - stop)
                seen = (x[:visible] for x in (k, v, *scales))
                out[tile:stop] = self._attend(scaled[tile:stop], *seen)

    def _first_block(self, context: int) -> int:
        """The first block that the query at position `context` (the earliest one) can see."""
        if self.spec.window is None:
            return 0
        return max(0, context - self.spec.window + 1) // self.spec.block_size

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of scaled q wide[n, q_heads, d] over k, v [m, kv_heads, d]; the last query is at m - 1.

        Scores and softmax are `wide`, fp32 or more; the weights are rounded to the values' dtype for the
        second product. With scales f32[m, kv_heads], k and v are codes: a score is multiplied by its key's
        scale, a weight by its value's, and stays wide, as fp16 has no room for such products.
        """
        spec, n, m = self.spec, q.shape[0], k.shape[0]
        group = spec.q_heads // spec.kv_heads
        # Query heads that share a KV head become rows of one matrix: [kv_heads, n * group, d].
        grouped = q.view(n, spec.kv_heads, group, -1).transpose(0, 1).reshape(spec.kv_heads, n * group, -1)
        scores = torch.matmul(grouped, k.to(self.wide).permute(1, 2, 0))
        if k_scale is not None:
            scores = scores * k_scale.to(self.wide).T[:, None]
        if spec.softcap is not None:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        if n > 1 or spec.window is not None:
            scores = scores.view(spec.kv_heads, n, group, m).masked_fill(
                self._hidden(n, m, q.device), -torch.inf
            )
            scores = scores.view(spec.kv_heads, n * group, m)
        weights = torch.softmax(scores, dim=-1)
        if v_scale is None:
            weights = weights.to(v.dtype)
        else:
            weights, v = weights * v_scale.to(self.wide).T[:, None], v.to(self.wide)
        attended = torch.matmul(weights, v.transpose(0, 1))
        return attended.view(spec.kv_heads, n, group, -1).transpose(0, 1).reshape(n, spec.q_heads, -1)

    def _hidden(self, n: int, m: int, device: torch.device) -> Tensor:
        """[n, 1, m]: True where the key lies after the query or before its window."""
        query = torch.arange(m - n, m, device=device)[:, None, None]
        key = torch.arange(m, device=device)
        hidden = key > query
        if self.spec.window is not None:
            hidden |= key <= query - self.spec.window
        return hidden

    def copy_blocks(self, cache: TorchCache, src: Tensor, dst: Tensor) -> None:
        for blocks in (*cache.blocks(), *cache.scale_blocks()):
            blocks[dst] = blocks[src]

    def read(self, cache: TorchCache, ids: Tensor) -> tuple[Tensor, Tensor]:
        keys, values, *scales = (blocks[ids] for blocks in (*cache.blocks(), *cache.scale_blocks()))
        if scales:
            return head_numbers(keys, scales[0]), head_numbers(values, scales[1])
        return keys, values
