"""Paged attention through torch's fused scaled-dot-product kernels.

Those kernels know no block table, so keys and values are gathered first: on a GPU decodes of similar
length together, padded to the longest of them; every other sequence by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from backbench.backends.interface import AttentionRunner, AttentionSpec, Batch, Device
from backbench.backends.torch.attention import TorchAttention, TorchCache, TorchRunner
from backbench.errors import BackendError

QUERY_TILE = 512
"""Query tokens per call where a mask has to be held in memory."""
BUCKET_RATIO = 0.75
"""Decodes at least this share as long as the longest of a bucket join it: at most a third is padding."""
BUCKET_TOKENS = 1 << 17
"""Most keys one bucket gathers, which bounds the memory of the copies."""


class SdpaAttention(TorchAttention):
    """Torch's fused attention; the cache is the torch backend's."""

    name = "sdpa"

    def refusals(self, spec: AttentionSpec, device: Device) -> list[str]:
        reasons = super().refusals(spec, device)
        if spec.kv_dtype != spec.dtype:
            reasons.append(f"the KV cache must have the model's dtype {spec.dtype}, not {spec.kv_dtype}")
        if spec.softcap is not None:
            reasons.append("scaled_dot_product_attention has no softcap")
        return reasons

    def open(self, spec: AttentionSpec, device: Device) -> AttentionRunner:
        if reasons := self.refusals(spec, device):
            raise BackendError(f"sdpa attention cannot serve this: {'; '.join(reasons)}; torch would.")
        return SdpaRunner(spec, device)


class SdpaRunner(TorchRunner):
    """The torch runner with the arithmetic handed to torch's fused kernels."""

    def __init__(self, spec: AttentionSpec, device: Device) -> None:
        super().__init__(spec, device)
        # In a bucket, the order of a sequence's sums depends on the others; on a CPU each runs alone.
        self.batch_invariant = device.torch_device.type == "cpu"
        if not self.batch_invariant:
            # Not at the top: it imports torch._dynamo, a second that listing backends need not wait for.
            from torch.nn.attention.bias import causal_lower_right

            self._lower_right = causal_lower_right

    def run(self, q: Tensor, cache: TorchCache, batch: Batch, out: Tensor) -> None:
        starts = batch.query_start[: batch.num_seqs + 1].tolist()
        lengths = batch.seq_lens[: batch.num_seqs].tolist()
        decodes = []
        for row, length in enumerate(lengths):
            queries = starts[row + 1] - starts[row]
            if queries == 1 and length > 0:
                decodes.append(row)
            elif queries > 1:
                self._sequence(q, cache, batch, out, row, starts[row], queries, length)
        # On a CPU a padded copy that leaves the cache costs more than 64 calls do.
        for bucket in buckets(decodes, lengths, 1 if self.batch_invariant else BUCKET_TOKENS):
            if len(bucket) == 1:
                row = bucket[0]
                self._sequence(q, cache, batch, out, row, starts[row], 1, lengths[row])
            else:
                self._decodes(q, cache, batch, out, bucket, [starts[row] for row in bucket], lengths)

    def _decodes(
        self,
        q: Tensor,
        cache: TorchCache,
        batch: Batch,
        out: Tensor,
        rows: Sequence[int],
        tokens: Sequence[int],
        lengths: Sequence[int],
    ) -> None:
        """One query token each: the query heads of a KV head are the rows of one small attention."""
        spec, device = self.spec, q.device
        at, into = torch.tensor(rows, device=device), torch.tensor(tokens, device=device)
        seen = [min(lengths[row], spec.window or lengths[row]) for row in rows]
        longest, shortest = max(seen), min(seen)
        last = batch.seq_lens.index_select(0, at).long()[:, None] - 1
        # Counted from the end, so that padding, which repeats the first visible key, comes last.
        offset = torch.arange(longest, device=device)
        live = offset < torch.tensor(seen, device=device)[:, None]
        positions = torch.where(live, last - offset, last)
        size, table = spec.block_size, batch.block_table.index_select(0, at).long()
        slots = (table.gather(1, positions // size) * size + positions % size).flatten()
        shape = (len(rows), longest, spec.kv_heads, spec.head_dim)
        keys, values = (
            x.index_select(0, slots).view(shape).transpose(1, 2) for x in (cache.keys, cache.values)
        )
        queries = q.index_select(0, into).view(len(rows), spec.kv_heads, -1, spec.head_dim)
        mask = None if longest == shortest else live[:, None, None, :]
        attended = scaled_dot_product_attention(queries, keys, values, mask, scale=spec.scale)
        out.index_copy_(0, into, attended.reshape(len(rows), spec.q_heads, spec.head_dim))

    def _sequence(
        self,
        q: Tensor,
        cache: TorchCache,
        batch: Batch,
        out: Tensor,
        row: int,
        start: int,
        queries: int,
        length: int,
    ) -> None:
        """One sequence by itself, its live blocks gathered whole."""
        spec, context = self.spec, length - queries
        first = 0 if spec.window is None else max(0, context - spec.window + 1)
        skipped = first // spec.block_size
        blocks = batch.block_table[row, skipped : -(-length // spec.block_size)]
        live = slice(first - skipped * spec.block_size, length - skipped * spec.block_size)
        keys, values = (
            x.index_select(0, blocks).flatten(0, 1)[live].transpose(0, 1)[None] for x in cache.blocks()
        )
        if queries == 1:
            own = q[start].view(1, spec.kv_heads, -1, spec.head_dim)
            attended = scaled_dot_product_attention(own, keys, values, scale=spec.scale)
            out[start] = attended.reshape(out[start].shape)  # strides differ from kernel to kernel
            return
        own = q[start : start + queries].transpose(0, 1)[None]
        out[start : start + queries] = self._causal(own, keys, values)[0].transpose(0, 1)

    def _causal(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Causal q [1, q_heads, n, d] over [1, kv_heads, L, d], its last query at the last key."""
        n, length, scale = q.shape[2], keys.shape[2], self.spec.scale
        if self.spec.window is None and n == length:
            return scaled_dot_product_attention(q, keys, values, is_causal=True, scale=scale, enable_gqa=True)
        group = self.spec.q_heads // self.spec.kv_heads
        if q.device.type != "cpu" and self.spec.window is None:
            # The flash kernels know this mask by name; they are only chosen for equal head counts.
            keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
            mask = self._lower_right(n, length)
            return scaled_dot_product_attention(q, keys, values, mask, scale=scale)
        return torch.cat([self._masked(q, keys, values, tile) for tile in range(0, n, QUERY_TILE)], dim=2)

    def _masked(self, q: Tensor, keys: Tensor, values: Tensor, tile: int) -> Tensor:
        """Queries [tile, tile + QUERY_TILE) under a mask held in memory, over the keys they can see."""
        n, length = q.shape[2], keys.shape[2]
        part = q[:, :, tile : tile + QUERY_TILE]
        end = length - n + tile + part.shape[2]
        query = torch.arange(end - part.shape[2], end, device=q.device)[:, None]
        key = torch.arange(end, device=q.device)
        mask = key <= query
        if self.spec.window is not None:
            mask &= key > query - self.spec.window
        keys, values = keys[:, :, :end], values[:, :, :end]
        return scaled_dot_product_attention(part, keys, values, mask, scale=self.spec.scale, enable_gqa=True)


def buckets(rows: Sequence[int], lengths: Sequence[int], most_tokens: int) -> Iterator[list[int]]:
    """Rows of similar length together, longest first, at most `most_tokens` padded keys in a bucket."""
    bucket: list[int] = []
    for row in sorted(rows, key=lambda row: -lengths[row]):
        longest = lengths[bucket[0]] if bucket else 0
        too_short = lengths[row] < BUCKET_RATIO * longest
        if bucket and (too_short or longest * (len(bucket) + 1) > most_tokens):
            yield bucket
            bucket = []
        bucket.append(row)
    if bucket:
        yield bucket
