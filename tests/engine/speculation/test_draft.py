"""A model that drafts: what it computes, and what it need not."""

from __future__ import annotations

from typing import Any

import pytest
from engine_fixtures import open_small
from speculation_fixtures import acceptance, open_speculating

from backbench.engine.engine import Engine
from backbench.engine.request import SamplingParams
from backbench.engine.speculation.draft import DraftProposer
from backbench.errors import EngineError

PROMPT = list(range(30, 70))
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)


def watched(engine: Engine) -> tuple[DraftProposer, list[int]]:
    """The proposer, and the tokens of every pass of its model from now on."""
    assert engine.speculator is not None
    proposer, passes = engine.speculator.proposer, list[int]()
    assert isinstance(proposer, DraftProposer)
    launch = proposer.runner.launch

    def counted(plan: Any) -> Any:
        passes.append(plan.num_tokens)
        return launch(plan)

    proposer.runner.launch = counted  # type: ignore[method-assign]
    return proposer, passes


def test_a_prefix_hit_serves_both_models() -> None:
    engine = open_speculating("draft that is the target", max_step_tokens=96)
    _, passes = watched(engine)
    engine.generate([PROMPT], GREEDY)
    cold = sum(passes)
    passes.clear()
    engine.generate([PROMPT], GREEDY)
    drafted, accepted = acceptance(engine)
    assert drafted == accepted > 0
    # All but the prompt's last block of 4 was found: 36 tokens, which neither model computes again.
    assert sum(passes) == cold - 36


def test_blocks_that_only_the_target_filled_are_computed_by_the_draft_model_later() -> None:
    engine = open_speculating("draft that is the target")
    _, passes = watched(engine)
    assert engine.speculator is not None
    choose = engine.speculator.choose
    engine.speculator.choose = lambda num_running: 0  # type: ignore[method-assign]
    engine.generate([PROMPT], GREEDY)
    assert passes == []
    engine.take_step_stats()
    engine.speculator.choose = choose  # type: ignore[method-assign]
    engine.generate([PROMPT], GREEDY)
    drafted, accepted = acceptance(engine)
    assert drafted == accepted > 0
    assert sum(passes) >= len(PROMPT)


def test_far_behind_it_catches_up_within_the_budget_of_a_step() -> None:
    engine = open_speculating("draft that is the target", max_step_tokens=8)
    _, passes = watched(engine)
    assert engine.speculator is not None
    choose = engine.speculator.choose
    engine.speculator.choose = lambda num_running: 0  # type: ignore[method-assign]
    engine.add_request("a", PROMPT, SamplingParams(max_tokens=40, ignore_eos=True))
    while len(engine.scheduler.waiting) or engine.scheduler.running[0].num_computed < 45:
        engine.step()
    engine.speculator.choose = choose  # type: ignore[method-assign]
    while engine.has_work:
        engine.step()
    assert passes[0] == 8 and max(passes) == 8
    drafted, accepted = acceptance(engine)
    assert drafted == accepted > 0


def test_other_vocabularies_and_shorter_contexts_are_refused() -> None:
    with pytest.raises(EngineError, match="same vocabulary"):
        open_small(speculate="draft:tiny:2")
    with pytest.raises(EngineError, match="Unknown model"):
        open_small(speculate="draft:tinny:2")
