"""Put one attention case through a runner: fill the cache around poison, run, keep everything observed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from backbench.backends.conformance import oracle
from backbench.backends.conformance.attention_cases import AttentionCase
from backbench.backends.conformance.scenario import (
    Layout,
    Row,
    Sequences,
    make_batch,
    permuted_layout,
    random_sequences,
    write_batch,
)
from backbench.backends.interface import AttentionRunner, AttentionSpec, Batch
from backbench.backends.quantization import kept_heads

SEED = 20261121


@dataclass(frozen=True)
class Setup:
    """A case's data, the same for every backend."""

    case: AttentionCase
    layout: Layout
    data: Sequences
    expected: Tensor
    """f64[T, q_heads, head_dim], live tokens only."""


def set_up(case: AttentionCase) -> Setup:
    """Random sequences, permuted blocks and the oracle's answer."""
    generator = torch.Generator().manual_seed(SEED)
    layout = permuted_layout([row.length for row in case.rows], case.spec.block_size, generator)
    data = random_sequences(case.rows, case.spec, generator)
    return Setup(case, layout, data, expected_output(data, case.spec))


def expected_output(data: Sequences, spec: AttentionSpec) -> Tensor:
    """The oracle's output for every sequence, over keys and values as the cache's dtype keeps them."""
    stored = [[kept_heads(x, spec.kv_dtype) for x in pair] for pair in zip(data.k, data.v, strict=True)]
    outputs = [oracle.attention(q, k, v, spec) for q, (k, v) in zip(data.q, stored, strict=True)]
    return torch.cat(outputs)


def poison_value(runner: AttentionRunner) -> float:
    """What unused slots hold: NaN, or something large where the runner needs finite values."""
    return 240.0 if runner.finite_cache else torch.nan


def poisoned_cache(runner: AttentionRunner, layout: Layout, spec: AttentionSpec, device: torch.device) -> Any:
    """A cache in which every slot holds poison, written through the runner's own `write`."""
    cache = runner.new_cache(layout.num_blocks)
    total = layout.num_blocks * layout.block_size
    table = torch.arange(layout.num_blocks, dtype=torch.int32, device=device)[None]
    for start in range(0, total, spec.max_tokens):
        slots = torch.arange(start, min(start + spec.max_tokens, total), device=device)
        shape = (slots.numel(), spec.kv_heads, spec.head_dim)
        poison = torch.full(shape, poison_value(runner), device=device)
        runner.write(cache, poison.to(spec.dtype), poison.to(spec.dtype), write_batch(slots, table))
    return cache


def write_positions(
    runner: AttentionRunner, cache: Any, setup: Setup, row: int, start: int, end: int, device: torch.device
) -> None:
    """Write positions [start, end) of sequence `row`."""
    step = setup.case.spec.max_tokens
    table = torch.tensor([setup.layout.blocks[row]], dtype=torch.int32, device=device)
    for first in range(start, end, step):
        last = min(first + step, end)
        slots = torch.tensor(setup.layout.slots(row, first, last), dtype=torch.int64, device=device)
        k, v = setup.data.k[row][first:last].to(device), setup.data.v[row][first:last].to(device)
        runner.write(cache, k, v, write_batch(slots, table))


def filled_cache(runner: AttentionRunner, setup: Setup, device: torch.device) -> Any:
    """Poison everywhere but in the context of each sequence."""
    cache = poisoned_cache(runner, setup.layout, setup.case.spec, device)
    for row, shape in enumerate(setup.case.rows):
        write_positions(runner, cache, setup, row, 0, shape.context, device)
    return cache


def step_inputs(setup: Setup, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Batch]:
    """q, k, v [T, heads, head_dim] of the step's tokens, with NaN in the padded tail, and its batch."""
    case = setup.case
    rows, data = case.rows, setup.data
    batch = make_batch(rows, setup.layout, device, pad_seqs=case.pad_seqs, pad_tokens=case.pad_tokens)
    batch.drafted = case.drafted
    new_k = [k[row.context :] for k, row in zip(data.k, rows, strict=True)]
    new_v = [v[row.context :] for v, row in zip(data.v, rows, strict=True)]

    def padded(parts: list[Tensor]) -> Tensor:
        live = torch.cat(parts)
        tail = live.new_full((case.pad_tokens, *live.shape[1:]), torch.nan)
        return torch.cat((live, tail)).to(device)

    return padded(list(data.q)), padded(new_k), padded(new_v), batch


def run_step(runner: AttentionRunner, cache: Any, setup: Setup, device: torch.device) -> Tensor:
    """Plan, write and run the step; the live rows of an output that held NaN before."""
    q, k, v, batch = step_inputs(setup, device)
    out = torch.full_like(q, torch.nan)
    runner.plan(batch)
    runner.write(cache, k, v, batch)
    runner.run(q, cache, batch, out)
    return out[: setup.expected.shape[0]]


def part(setup: Setup, chosen: list[int]) -> Setup:
    """The same sequences, only those of `chosen` in the batch, with the cache blocks they had."""
    rows: tuple[Row, ...] = tuple(setup.case.rows[i] for i in chosen)
    data = Sequences(
        tuple(setup.data.q[i] for i in chosen),
        tuple(setup.data.k[i] for i in chosen),
        tuple(setup.data.v[i] for i in chosen),
    )
    layout = Layout(
        tuple(setup.layout.blocks[i] for i in chosen),
        setup.layout.num_blocks,
        setup.layout.block_size,
        setup.layout.spare,
    )
    case = AttentionCase(setup.case.name, setup.case.kind, setup.case.spec, rows)
    return Setup(case, layout, data, expected_output(data, case.spec))
