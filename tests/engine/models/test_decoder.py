"""Forward passes without an engine."""

from __future__ import annotations

import torch
from engine_fixtures import open_small

from backbench.engine.models.decoder import whole_sequences


def test_whole_sequences_side_by_side_equal_each_alone() -> None:
    decoder = open_small().decoder
    lengths = [9, 4, 1]

    def hidden(some: list[int]) -> torch.Tensor:
        ids = torch.cat([torch.arange(length) + 3 * length for length in some])
        positions = torch.cat([torch.arange(length) for length in some])
        blocks = sum(-(-length // decoder.limits.block_size) for length in some)
        batch = whole_sequences(some, decoder.limits.block_size, torch.device("cpu"))
        return decoder.forward(ids, positions, batch, decoder.new_caches(blocks))

    torch.testing.assert_close(hidden(lengths), torch.cat([hidden([length]) for length in lengths]))


def test_a_profile_serves_every_step_that_fits() -> None:
    decoder = open_small().decoder
    for lengths in ([1], [20, 20, 7], [5] * 8):
        decoder.profile(lengths, 8)
