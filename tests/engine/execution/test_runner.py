"""Launching steps; what runs on the device is tested through the engine."""

from __future__ import annotations

import pytest
import torch
from engine_fixtures import open_small
from late_device import LateQueue, open_late

from backbench.engine.execution.runner import Runner
from backbench.engine.execution.step_buffers import StepBuffers
from backbench.engine.execution.step_shape import StepShape, graph_shapes
from backbench.engine.request import SamplingParams


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("chunk", [None, 5])
def test_padded_steps_change_no_token(temperature: float, chunk: int | None) -> None:
    """The layout of captured steps, computed eagerly: a graph needs a GPU, its layout does not."""
    params = SamplingParams(max_tokens=9, ignore_eos=True, temperature=temperature, seed=1)
    prompts = [[(7 * i + j) % 97 for j in range(3 + 11 * i)] for i in range(7)]
    limits = {"max_step_tokens": 128, "max_seqs": 20, "prefill_chunk": chunk}

    def serve(padded: bool) -> list[list[int]]:
        engine = open_small(**limits)
        runner = engine.runner
        if padded:
            runner._shapes = graph_shapes(20, 128, mixed=True)
            largest = max(shape.num_tokens for shape in runner._shapes)
            runner._captured = StepBuffers(
                runner.limits, runner._eager.tables, torch.device("cpu"), runner.queue, largest
            )
        done = []
        for first in range(0, len(prompts), 3):  # later prompts join running decodes
            for i, prompt in enumerate(prompts[first : first + 3], start=first):
                engine.add_request(str(i), prompt, params)
            done += [token for _ in range(2) for token in engine.step()]
        while engine.has_work:
            done += engine.step()
        if padded:
            assert runner.graph_misses >= 9, "few steps are too large for a captured shape"
        return [[token.token_id for token in done if token.request_id == str(i)] for i in range(7)]

    assert serve(padded=True) == serve(padded=False)


def test_more_prefix_hits_than_a_step_buffer_holds() -> None:
    """Hits of many long prompts change more block table entries than the step's tokens could."""
    engine = open_small(max_step_tokens=8, max_seqs=4, num_blocks=200)
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    prompts = [[(5 * i + j) % 97 for j in range(110)] for i in range(4)]
    cold = [done.token_ids for done in engine.generate(prompts, params)]
    assert engine.runner._eager.max_updates < 4 * 27
    warm = [done.token_ids for done in engine.generate(prompts, params)]
    assert warm == cold
    assert sum(step.prefix_hit_tokens for step in engine.take_step_stats()) == 4 * 108


def test_a_step_that_samples_nothing_is_waited_for_too() -> None:
    """Its blocks may be found and its memory written again once it has landed."""
    engine = open_late(prefill_chunk=4)
    queue = engine.runner.queue
    assert isinstance(queue, LateQueue)
    engine.add_request("a", list(range(20)), SamplingParams(max_tokens=2))
    for _ in range(3):
        assert engine.step() == []
        assert queue.num_pending == 2, "the upload and the computing of one step in flight"


@pytest.mark.parametrize("graphs", [True, False])
def test_no_graphs_on_a_cpu(graphs: bool) -> None:
    engine = open_small(graphs=graphs)
    assert engine.runner.capture() == 0
    assert not engine.runner.graphs_enabled


@pytest.mark.parametrize(
    ("few_queries", "expected"),
    [(1, StepShape(5)), (4, StepShape(5)), (5, StepShape(0, 1, 5, 5)), (8, StepShape(0, 1, 5, 5))],
)
def test_drafts_are_decodes_where_attention_has_no_tile_for_them(
    few_queries: int, expected: StepShape
) -> None:
    """Four drafted tokens make five of a sequence."""
    small = open_small(speculate="ngram:4", max_seqs=8)
    for runner in small.decoder.runners.values():
        runner.few_queries = few_queries
    runner = Runner(small.decoder, small.selection.operations, small.limits, graphs=True)
    runner._shapes = [StepShape(5), StepShape(0, 1, 5, 5)]
    assert runner.captured_shape(StepShape(0, 1, 5, 5), decodes=True) == expected
    assert runner.captured_shape(StepShape(0, 1, 3, 3), decodes=True) == expected
    assert runner.captured_shape(StepShape(0, 1, 5, 5), decodes=False) == StepShape(0, 1, 5, 5)
