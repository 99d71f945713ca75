from __future__ import annotations

import pytest
from engine_fixtures import open_small
from speculation_fixtures import open_speculating

from backbench.engine.request import SamplingParams
from backbench.engine.speculation.speculator import Drafts


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
