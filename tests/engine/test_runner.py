"""Graph sizes and launch keys; what runs on the device is tested through the engine."""

from __future__ import annotations

import itertools

import pytest
from engine_fixtures import open_small
from hypothesis import given
from hypothesis import strategies as st

from engine.request import SamplingParams
from engine.runner import graph_sizes, max_len_ladder


@given(st.integers(1, 5000))
def test_graph_sizes_cover_every_batch_up_to_the_largest(max_seqs: int) -> None:
    sizes = graph_sizes(max_seqs)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == min(max_seqs, 1024)
    waste = [(b - a) / b for a, b in itertools.pairwise(sizes) if a >= 8]
    assert all(part <= 0.5 for part in waste)


@given(st.integers(1, 200_000))
def test_the_ladder_of_lengths_descends_from_the_longest(max_len: int) -> None:
    ladder = max_len_ladder(max_len)
    assert ladder[0] == max_len
    assert ladder == sorted(set(ladder), reverse=True)
    assert ladder[-1] <= 128


def test_more_prefix_hits_than_a_step_buffer_holds() -> None:
    """Hits of many long prompts change more block table entries than the step's tokens could."""
    engine = open_small(max_step_tokens=8, max_seqs=4, num_blocks=200)
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    prompts = [[(5 * i + j) % 97 for j in range(110)] for i in range(4)]
    cold = [done.token_ids for done in engine.generate(prompts, params)]
    assert engine.runner._mixed.max_updates < 4 * 27
    warm = [done.token_ids for done in engine.generate(prompts, params)]
    assert warm == cold
    assert sum(step.prefix_hit_tokens for step in engine.take_step_stats()) == 4 * 108


@pytest.mark.parametrize("graphs", [True, False])
def test_no_graphs_on_a_cpu(graphs: bool) -> None:
    engine = open_small(graphs=graphs)
    assert engine.runner.capture() == 0
    assert not engine.runner.graphs_enabled
