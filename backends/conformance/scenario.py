"""Batches for checks and measurements: sequences spread over permuted cache blocks, padding, poison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backbench.backends.interface import AttentionSpec, Batch


@dataclass(frozen=True)
class Row:
    """One sequence of a batch: `query` new tokens, `length` keys once they are written."""

    query: int
    length: int

    @property
    def context(self) -> int:
        return self.length - self.query


@dataclass(frozen=True)
class Layout:
    """Which physical blocks each sequence owns."""

    blocks: tuple[tuple[int, ...], ...]
    num_blocks: int
    block_size: int
    spare: tuple[int, ...]
    """Blocks that belong to nobody."""

    def slots(self, row: int, start: int, end: int) -> list[int]:
        """Physical slots of positions [start, end) of sequence `row`."""
        size, owned = self.block_size, self.blocks[row]
        return [owned[p // size] * size + p % size for p in range(start, end)]


def permuted_layout(
    lengths: Sequence[int], block_size: int, generator: torch.Generator, spare: int = 2
) -> Layout:
    """Give each sequence its blocks out of a random permutation, `spare` blocks left over."""
    needs = [-(-length // block_size) for length in lengths]
    total = sum(needs) + spare
    order = torch.randperm(total, generator=generator).tolist()
    blocks, start = [], 0
    for need in needs:
        blocks.append(tuple(order[start : start + need]))
        start += need
    return Layout(tuple(blocks), total, block_size, tuple(order[start:]))


def make_batch(
    rows: Sequence[Row],
    layout: Layout,
    device: torch.device,
    *,
    pad_seqs: int = 0,
    pad_tokens: int = 0,
) -> Batch:
    """The batch of `rows` with `pad_seqs` inert rows and `pad_tokens` inert tokens behind them.

    Block table entries past a sequence's length name spare blocks, which hold poison in checks.
    """
    live_tokens = sum(row.query for row in rows)
    starts = [0]
    for row in rows:
        starts.append(starts[-1] + row.query)
    starts += [live_tokens] * pad_seqs
    lengths = [row.length for row in rows] + [0] * pad_seqs
    width = max(len(owned) for owned in layout.blocks) + 1
    filler = layout.spare[0] if layout.spare else 0
    table = [[*owned, *[filler] * (width - len(owned))] for owned in layout.blocks]
    table += [[filler] * width] * pad_seqs
    slots = [slot for i, row in enumerate(rows) for slot in layout.slots(i, row.context, row.length)]
    decodes = next((i for i, row in enumerate(rows) if row.query != 1), len(rows))
    return Batch(
        query_start=torch.tensor(starts, dtype=torch.int32, device=device),
        seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
        block_table=torch.tensor(table, dtype=torch.int32, device=device),
        slots=torch.tensor(slots + [-1] * pad_tokens, dtype=torch.int64, device=device),
        num_seqs=len(rows) + pad_seqs,
        num_tokens=live_tokens + pad_tokens,
        num_decodes=decodes + (pad_seqs if decodes == len(rows) else 0),
        max_query=max(row.query for row in rows),
        max_len=max(row.length for row in rows),
    )


def write_batch(slots: Tensor, block_table: Tensor) -> Batch:
    """A batch that is only written: one sequence whose tokens go to `slots` i64[T]."""
    count = slots.numel()
    device = slots.device
    return Batch(
        query_start=torch.tensor([0, count], dtype=torch.int32, device=device),
        seq_lens=torch.tensor([count], dtype=torch.int32, device=device),
        block_table=block_table[:1],
        slots=slots,
        num_seqs=1,
        num_tokens=count,
        num_decodes=0,
        max_query=count,
        max_len=count,
    )


@dataclass(frozen=True)
class Sequences:
    """Every sequence's keys, values and queries, on the CPU in the model's dtype."""

    q: tuple[Tensor, ...]
    """[query, q_heads, head_dim] a sequence."""
    k: tuple[Tensor, ...]
    """[length, kv_heads, head_dim] a sequence."""
    v: tuple[Tensor, ...]


def random_sequences(rows: Sequence[Row], spec: AttentionSpec, generator: torch.Generator) -> Sequences:
    """Values as a trained model has them, roughly: peaked scores, an attention sink, values of unit size.

    Queries of standard deviation 2 spread the scores by 2; the first key of a sequence draws attention.
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    q, k, v = [], [], []
    for row in rows:
        queries, keys = (
            2 * normal(row.query, spec.q_heads, spec.head_dim),
            normal(row.length, spec.kv_heads, spec.head_dim),
        )
        keys[0] *= 1.5
        q.append(queries.to(spec.dtype))
        k.append(keys.to(spec.dtype))
        v.append(normal(row.length, spec.kv_heads, spec.head_dim).to(spec.dtype))
    return Sequences(tuple(q), tuple(k), tuple(v))
