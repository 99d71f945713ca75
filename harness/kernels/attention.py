"""Attention problems: a batch of the shape grammar over permuted cache blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from backbench.backends.conformance import oracle
from backbench.backends.conformance.scenario import Layout, Row, make_batch, permuted_layout, write_batch
from backbench.backends.conformance.tolerance import CEILING_ROUNDINGS, deviation, rounding
from backbench.backends.interface import (
    Attention,
    AttentionRunner,
    AttentionSpec,
    Backend,
    Batch,
    Device,
    GraphSupport,
)
from backbench.harness.kernels.problem import Check, Prepared, Problem, rotations
from backbench.harness.kernels.shapes import format_shape

SEED = 20261125
CHUNK_TOKENS = 4096
"""Keys written to the cache in one call."""
CHECKED_QUERIES = 4
"""Queries of a checked sequence that are compared, its last ones."""


@dataclass(frozen=True)
class Geometry:
    """The layer that the batch goes through."""

    q_heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype


def attention_problem(rows: tuple[Row, ...], geometry: Geometry) -> Problem:
    """Bytes: every key and value once, queries and outputs. FLOPs: 4 * head_dim per visible pair and head."""
    pairs = sum(row.query * row.length - row.query * (row.query - 1) // 2 for row in rows)
    keys, queries = sum(row.length for row in rows), sum(row.query for row in rows)
    width = 2 * (keys * geometry.kv_heads + queries * geometry.q_heads) * geometry.head_dim
    return Problem(
        "attention",
        f"{format_shape(rows)} {geometry.q_heads}/{geometry.kv_heads}x{geometry.head_dim}",
        str(geometry.dtype).removeprefix("torch."),
        width * geometry.dtype.itemsize,
        4 * pairs * geometry.q_heads * geometry.head_dim,
        partial(prepare, rows, geometry),
    )


def make_spec(rows: Sequence[Row], geometry: Geometry) -> AttentionSpec:
    """The spec of a layer that serves just this batch."""
    return AttentionSpec(
        q_heads=geometry.q_heads,
        kv_heads=geometry.kv_heads,
        head_dim=geometry.head_dim,
        dtype=geometry.dtype,
        kv_dtype=geometry.dtype,
        block_size=geometry.block_size,
        scale=geometry.head_dim**-0.5,
        max_seqs=max(len(rows), 16),
        max_tokens=max(CHUNK_TOKENS, sum(row.query for row in rows)),
        max_len=max(row.length for row in rows),
    )


def prepare(
    rows: tuple[Row, ...], geometry: Geometry, backend: Backend, device: Device
) -> Prepared | list[str]:
    """The rotating calls on one pool of blocks, after comparing two sequences with the oracle."""
    if backend.attention is None:
        return [f"attention is served by {backend.base}"]
    spec = make_spec(rows, geometry)
    if reasons := backend.attention.refusals(spec, device):
        return reasons
    stage = Stage(backend.attention, spec, rows, device)
    queries = sum(row.query for row in rows)
    batches = [stage.batch(i) for i in range(stage.copies)]
    generator = torch.Generator().manual_seed(SEED)
    q = 2 * torch.randn(queries, spec.q_heads, spec.head_dim, generator=generator)
    q = q.to(spec.dtype).to(device.torch_device)
    out = torch.full_like(q, torch.nan)
    runner = stage.runner
    runner.plan(batches[0])
    runner.run(q, stage.cache, batches[0], out)
    needed = GraphSupport.DECODE if all(row.query == 1 for row in rows) else GraphSupport.MIXED
    calls = [partial(runner.run, q, stage.cache, batch, out) for batch in batches]
    return Prepared(calls, stage.check(q, out), runner.graph >= needed)


class Stage:
    """A filled cache that holds the batch several times over, in blocks of one permutation."""

    def __init__(
        self, attention: Attention, spec: AttentionSpec, rows: tuple[Row, ...], device: Device
    ) -> None:
        self.spec, self.rows, self.device = spec, rows, device
        keys = sum(row.length for row in rows)
        bytes_per_call = 2 * keys * spec.kv_heads * spec.head_dim * spec.dtype.itemsize
        self.copies = rotations(device, bytes_per_call)
        generator = torch.Generator().manual_seed(SEED)
        lengths = [row.length for row in rows] * self.copies
        self.layout = permuted_layout(lengths, spec.block_size, generator)
        self.runner: AttentionRunner = attention.open(spec, device)
        self.cache: Any = self.runner.new_cache(self.layout.num_blocks)
        # Every sequence is a window of one long random one, each from its own start.
        longest, spread = max(lengths), 1024
        shape = (longest + spread, spec.kv_heads, spec.head_dim)
        self.keys, self.values = (
            torch.randn(shape, generator=generator).to(spec.dtype).to(device.torch_device) for _ in range(2)
        )
        self.starts = torch.randint(0, spread, (len(lengths),), generator=generator).tolist()
        for i, length in enumerate(lengths):
            self._fill(i, length)

    def _fill(self, sequence: int, length: int) -> None:
        owned = torch.tensor(self.layout.blocks[sequence], device=self.device.torch_device)
        size, table = self.spec.block_size, owned[None].int()
        for first in range(0, length, CHUNK_TOKENS):
            position = torch.arange(first, min(first + CHUNK_TOKENS, length), device=owned.device)
            slots = owned[position // size] * size + position % size
            k, v = (x[self.starts[sequence] + position] for x in (self.keys, self.values))
            self.runner.write(self.cache, k, v, write_batch(slots, table))

    def batch(self, copy: int) -> Batch:
        """The `copy`-th set of sequences."""
        first = copy * len(self.rows)
        owned = self.layout.blocks[first : first + len(self.rows)]
        layout = Layout(owned, self.layout.num_blocks, self.spec.block_size, self.layout.spare)
        return make_batch(self.rows, layout, self.device.torch_device)

    def check(self, q: Tensor, out: Tensor) -> Check:
        """The last queries of the first and of the last sequence, in their first and last KV heads."""
        worst = Check(0.0, 0.0)
        group = self.spec.q_heads // self.spec.kv_heads
        ends = torch.tensor([row.query for row in self.rows]).cumsum(0).tolist()
        for i in sorted({0, len(self.rows) - 1}):
            row = self.rows[i]
            tokens = slice(ends[i] - min(row.query, CHECKED_QUERIES), ends[i])
            window = slice(self.starts[i], self.starts[i] + row.length)
            for head in sorted({0, self.spec.kv_heads - 1}):
                own = slice(head * group, (head + 1) * group)
                k, v = (x[window, head : head + 1].cpu() for x in (self.keys, self.values))
                narrow = AttentionSpec(
                    group, 1, self.spec.head_dim, k.dtype, k.dtype, self.spec.block_size, self.spec.scale
                )
                wanted = oracle.attention(q[tokens, own].cpu(), k, v, narrow)
                limit = CEILING_ROUNDINGS * rounding(k.dtype) * float(wanted.abs().max())
                found = Check(deviation(out[tokens, own], wanted).largest, limit)
                worst = max(worst, found, key=lambda each: each.error / each.limit if each.limit else -1.0)
        return worst
