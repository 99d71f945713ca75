"""What a timed attention call reads: a cache as a server's looks after a while, not a flattering one."""

from __future__ import annotations

from itertools import pairwise

import torch

from backbench.backends.conformance.scenario import Row
from backbench.backends.interface import device
from backbench.backends.torch.attention import TorchAttention
from backbench.harness.kernels.attention import Geometry, Stage, make_spec


def test_mistake_15_blocks_are_permuted_values_random_and_lengths_unequal() -> None:
    """Ordered blocks hide the cost of paging, zeros let clocks rise, equal lengths balance every split."""
    rows = (Row(1, 100), Row(1, 333), Row(1, 50))
    spec = make_spec(rows, Geometry(8, 2, 64, 16, torch.float32))
    stage = Stage(TorchAttention(), spec, rows, device.detect(prefer="cpu"))
    batch = stage.batch(0)
    assert batch.seq_lens.tolist() == [100, 333, 50]
    steps: list[int] = []
    for row, table in zip(rows, batch.block_table.tolist(), strict=True):
        blocks = table[: -(-row.length // 16)]
        assert len(set(blocks)) == len(blocks)
        steps += [after - before for before, after in pairwise(blocks)]
    # In a random order half of the steps go back, and few go to the next block.
    assert 0.25 < sum(step < 0 for step in steps) / len(steps) < 0.75
    assert steps.count(1) < len(steps) / 4
    assert stage.copies == 1 or set(stage.batch(1).block_table[0].tolist()) != set(
        batch.block_table[0].tolist()
    )
    for values in (stage.keys, stage.values):
        assert (values == 0).float().mean() < 0.01
        assert 0.9 < values.std() < 1.1
    assert len(set(stage.starts)) > 1, "no two sequences hold the same"
