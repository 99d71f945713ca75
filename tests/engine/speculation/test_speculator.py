from __future__ import annotations

import pytest
from engine_fixtures import open_small
from speculation_fixtures import open_speculating

from backbench.engine.execution.step_shape import StepShape
from backbench.engine.request import SamplingParams
from backbench.engine.scheduling.scheduler import Slice, StepPlan
from backbench.engine.scheduling.sequence import Sequence
from backbench.engine.speculation.speculator import Drafts, Speculator


@pytest.mark.parametrize("proposer", ["ngram", "draft of one layer"])
def test_a_step_that_catches_up_says_nothing_of_the_time_a_draft_takes(proposer: str) -> None:
    """The first drafts read whole prompts: an index of their n-grams, or the draft model's own pass."""
    engine = open_speculating(proposer)
    speculator = engine.speculator
    assert speculator is not None
    seen: list[bool] = []
    observe = speculator.observe

    def spied(drafts: Drafts, seconds: float, *, decodes_only: bool) -> None:
        if drafts.asked and decodes_only:
            seen.append(drafts.steady)
        observe(drafts, seconds, decodes_only=decodes_only)

    speculator.observe = spied  # type: ignore[method-assign]
    engine.generate([[5, 9, 2] * 5], SamplingParams(max_tokens=20, ignore_eos=True))
    assert seen[0] is False and all(seen[1:]) and len(seen) > 5
    times = speculator.length._times[1]
    assert sum(map(len, times.drafted.values())) <= min(len(seen) - 1, 16)


def test_nothing_runs_nothing_is_asked() -> None:
    speculator = open_small(speculate="ngram:2", adaptive_drafts=False).speculator
    assert speculator is not None
    assert speculator.choose(0) == 0 and speculator.choose(1) == 2


def next_shape(speculator: Speculator, *decodes: tuple[int, int], prompts: int = 0) -> StepShape | None:
    """decodes: tokens left to each where all its drafts are accepted, and how many those are."""
    plan = StepPlan(num_decodes=len(decodes))
    for left, drafted in [*decodes, *[(9, 0)] * prompts]:
        sequence = Sequence("a", 0, [1, 2, 3], SamplingParams(max_tokens=20), 0)
        sequence.running = True
        sequence.num_tokens = sequence.end_len - left - drafted
        plan.slices.append(Slice(sequence, 3, 1 + drafted, 1 + drafted, 0, (7,) * drafted))
        plan.num_drafted += drafted
    return speculator.next_shape(plan, Drafts(asked=3, num_running=len(decodes)))


def test_the_least_that_the_next_step_holds() -> None:
    speculator = open_small(speculate="ngram:3", adaptive_drafts=False).speculator
    assert speculator is not None
    assert next_shape(speculator, (9, 3)) == StepShape(0, 1, 4, 4)
    assert next_shape(speculator, (9, 3), (9, 0), (9, 1)) == StepShape(0, 3, 7, 4)
    assert next_shape(speculator, (3, 3)) == StepShape(0, 1, 3, 3), "the last draft finds less room"
    assert next_shape(speculator, (0, 3), (9, 2)) == StepShape(0, 1, 3, 3), "the first may end in this step"
    assert next_shape(speculator, (0, 3)) is None
    assert next_shape(speculator, (1, 3)) is None, "a plain decode"
    assert next_shape(speculator, (9, 0)) is None
    assert next_shape(speculator, (9, 3), prompts=1) is None
