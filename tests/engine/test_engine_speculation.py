"""Speculation changes no token: random traffic equals each sequence served alone without it.

Greedy and seeded sampling with top-k, top-p, min-p, stop strings and n > 1, for every proposer, over random
batches, chunks, preemptions, prefix hits and aborts. The faults that it must find are planted below.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_fixtures import WordTokenizer, nothing_is_kept, open_small
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from late_device import make_late
from speculation_fixtures import PROPOSERS, acceptance, check_books, open_speculating
from traffic import alone, engines, serve

from backbench.engine.engine import Engine
from backbench.engine.execution.step_shape import FEW_DRAFTED
from backbench.engine.models.decoder import whole_sequences
from backbench.engine.request import SamplingParams
from backbench.engine.scheduling.scheduler import Scheduler, Slice
from backbench.engine.scheduling.sequence import Sequence
from backbench.engine.speculation.draft import DraftProposer
from backbench.engine.speculation.speculator import Speculator
from backbench.errors import EngineError


def knows(sequence: Sequence) -> list[int]:
    prompt = tuple(sequence.token_ids[: sequence.prompt_len])
    return list(alone(prompt, sequence.params, sequence.index)[0])


def run_traffic(proposer: str, setting: dict[str, Any], data: st.DataObject, **more: Any) -> Engine:
    """Serve random traffic and check every sequence and the books after every step."""
    engine = open_speculating(proposer, knows=knows, tokenizer=WordTokenizer(), **(setting | more))
    step = engine.step

    def checked() -> Any:
        tokens = step()
        if engine.max_steps_in_flight == 1:
            check_books(engine)
        return tokens

    engine.step = checked  # type: ignore[method-assign]
    for asked in serve(engine, data):
        asked.check()
    assert engine.pool.num_used == 0
    assert nothing_is_kept(engine)
    return engine


@pytest.mark.parametrize("proposer", PROPOSERS)
def test_every_sequence_equals_the_same_served_alone_without_speculation(proposer: str) -> None:
    seen = [0, 0]

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(engines(), st.data())
    def run(setting: dict[str, Any], data: st.DataObject) -> None:
        drafted, accepted = acceptance(run_traffic(proposer, setting, data))
        seen[0] += drafted
        seen[1] += accepted

    run()
    drafted, accepted = seen
    assert drafted > 0
    # What a random model says seldom repeats itself, and no random head knows it: see the test of n-grams
    # that come true, and `speculation/test_eagle3`.
    assert accepted > 0 or proposer in ("ngram", "eagle3 head")


@pytest.mark.parametrize("proposer", ["ngram", "draft of one layer", "eagle3 head"])
def test_what_adapts_by_time_changes_no_token(proposer: str) -> None:
    """Two steps in flight while nothing is drafted, and times that mean nothing: every switch comes up."""

    @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
    @given(engines(), st.randoms(use_true_random=False), st.data())
    def run(setting: dict[str, Any], random: Any, data: st.DataObject) -> None:
        engine = open_speculating(proposer, tokenizer=WordTokenizer(), **setting)
        engine.max_steps_in_flight = 2
        assert engine.speculator is not None
        engine.speculator.choose = lambda num_running: random.choice([0, 0, 1, 3])  # type: ignore[method-assign]
        for asked in serve(engine, data):
            asked.check()
        assert engine.pool.num_used == 0

    run()


@pytest.mark.parametrize("proposer", ["one that knows", "eagle3 head"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_late_device_and_captured_layouts(padded: bool, proposer: str) -> None:
    """Laid out as captured graphs have them: few drafts as decodes, or as sequences that draw everywhere."""

    @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
    @given(engines(), st.sampled_from([0, FEW_DRAFTED]), st.data())
    def run(setting: dict[str, Any], few_drafted: int, data: st.DataObject) -> None:
        engine = open_speculating(proposer, knows=knows, tokenizer=WordTokenizer(), **setting)
        make_late(engine, padded=padded).runner.few_drafted = few_drafted
        engine.max_steps_in_flight = 1
        for asked in serve(engine, data):
            asked.check()

    run()


PERIODIC = tuple([5, 9, 2] * 6)


@pytest.mark.parametrize("proposer", PROPOSERS)
@pytest.mark.parametrize("filters", [{}, {"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.05}], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_filters(proposer: str, filters: dict[str, Any], temperature: float) -> None:
    params = SamplingParams(max_tokens=40, ignore_eos=True, temperature=temperature, seed=3, n=2, **filters)
    prompts = [PERIODIC, tuple(range(7)), (1,)]
    engine = open_speculating(proposer, knows=knows, tokenizer=WordTokenizer())
    done = engine.generate(prompts, params)
    expected = [alone(prompt, params, index)[0] for prompt in prompts for index in range(2)]
    assert [one.token_ids for one in done] == expected


@pytest.mark.parametrize("temperature", [0.0, 0.1])
def test_n_grams_that_come_true_save_steps(temperature: float) -> None:
    """A cold random model falls into loops."""
    params = SamplingParams(max_tokens=90, ignore_eos=True, temperature=temperature)
    engine = open_speculating("ngram")
    done = engine.generate([PERIODIC, (0,) * 10], params)
    assert [one.token_ids for one in done] == [
        alone(prompt, params, 0)[0] for prompt in (PERIODIC, (0,) * 10)
    ]
    assert acceptance(engine)[1] > 10


def test_log_probabilities_are_those_without_speculation() -> None:
    params = SamplingParams(max_tokens=20, ignore_eos=True, temperature=0.7, logprobs=True)
    plain = open_small().generate([PERIODIC], params)[0]
    done = open_speculating("draft that is the target").generate([PERIODIC], params)[0]
    assert done.token_ids == plain.token_ids and done.top_tokens == plain.top_tokens
    assert done.logprobs == pytest.approx(plain.logprobs, abs=1e-4)


def test_a_draft_that_is_the_target_is_always_right() -> None:
    """Greedy and sampled alike: both models draw with the same noise. A prefix hit serves both, too."""
    engine = open_speculating("draft that is the target", num_blocks=40)
    for params in (
        SamplingParams(max_tokens=30, ignore_eos=True),
        SamplingParams(max_tokens=30, ignore_eos=True, temperature=1.0, top_p=0.9, n=3),
    ):
        for _ in range(2):
            engine.generate([PERIODIC, tuple(range(20))], params)
            drafted, accepted = acceptance(engine)
            assert drafted == accepted > 0


def test_what_a_request_cannot_ask_for() -> None:
    engine = open_small(speculate="synthetic:2:3")
    with pytest.raises(EngineError, match="forced_tokens"):
        engine.add_request("a", [1], SamplingParams(max_tokens=1, forced_tokens=(1,)))
    with pytest.raises(EngineError, match="log-probabilities"):
        engine.add_request("a", [1], SamplingParams(logprobs=True))
    with pytest.raises(EngineError, match="rejection"):
        open_small(speculation_sampling="rejection")


def test_warming_up_drafts_and_leaves_nothing_behind() -> None:
    engine = open_small(speculate="ngram:3")
    steps: list[int] = []
    launch = engine.runner.launch
    engine.runner.launch = lambda plan: (steps.append(plan.num_drafted), launch(plan))[1]  # type: ignore
    engine.warm_up()
    assert max(steps) > 0
    assert engine.speculator is not None and not engine.speculator.padding
    assert engine.take_step_stats() == []


# Planted faults: each is caught by a test that passes without it.


def finds_a_wrong_token(proposer: str) -> bool:
    params = SamplingParams(max_tokens=40, ignore_eos=True, temperature=0.9, seed=3)
    engine = open_speculating(proposer, knows=knows, tokenizer=WordTokenizer())
    done = engine.generate([PERIODIC, tuple(range(7))], params)
    return [one.token_ids for one in done] != [alone(p, params, 0)[0] for p in (PERIODIC, tuple(range(7)))]


def test_an_accepted_token_too_many_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not finds_a_wrong_token("one that knows")
    judge = Speculator.outputs

    def one_more(self: Speculator, part: Slice, drawn: list[int]) -> list[int]:
        count = len(judge(self, part, drawn))
        return [*part.draft[:count], drawn[count]] if count < len(drawn) else judge(self, part, drawn)

    monkeypatch.setattr(Speculator, "outputs", one_more)
    assert finds_a_wrong_token("one that knows")


def test_a_tentative_block_published_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The books say so at once, and a later hit on such a block gives wrong tokens."""
    extend = Scheduler.extend

    def publishes(self: Scheduler, plan: Any, part: Slice, drafted: list[int]) -> None:
        extend(self, plan, part, drafted)
        sequence, size = part.sequence, self.pool.block_size
        tokens = [*sequence.token_ids, *drafted]
        for i in range(sequence.num_published, len(tokens) // size):
            self.pool.publish(sequence.blocks[i], self.pool.digest(tokens, [], i))

    def serve_twice(book_check: Callable[[Engine], None]) -> None:
        engine = open_speculating("one that knows", knows=knows, tokenizer=WordTokenizer())
        engine.add_request("a", PERIODIC, SamplingParams(max_tokens=40, ignore_eos=True))
        while engine.has_work:
            engine.step()
            book_check(engine)

    serve_twice(check_books)
    monkeypatch.setattr(Scheduler, "extend", publishes)
    with pytest.raises(AssertionError):
        serve_twice(check_books)


def test_a_stale_draft_cache_after_a_rollback_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens stay right whatever is drafted, so the draft model's cache is held to what it says of itself."""
    assert draft_caches_are_right()
    state = DraftProposer._state

    def no_rollback(self: DraftProposer, sequence: Sequence, pool: Any) -> Any:
        known = sequence.proposer_state
        if known is not None and known.blocks is sequence.blocks:
            held = len(sequence.blocks) * pool.block_size
            known.tokens = min(known.tokens + len(known.guessed), held)
            known.guessed = []
        return state(self, sequence, pool)

    with monkeypatch.context() as planted:
        planted.setattr(DraftProposer, "_state", no_rollback)
        assert not draft_caches_are_right()
    propose = DraftProposer.propose

    def takes_the_last_for_computed(self: DraftProposer, plan: Any, rooms: list[int], pool: Any) -> Any:
        drafts = propose(self, plan, rooms, pool)
        for part, drafted in zip(plan.slices, drafts, strict=False):
            if drafted:
                part.sequence.proposer_state.guessed = list(drafted)
        return drafts

    monkeypatch.setattr(DraftProposer, "propose", takes_the_last_for_computed)
    assert not draft_caches_are_right("draft that is the target")


def draft_caches_are_right(proposer: str = "draft of one layer") -> bool:
    """Whether, after every step, the draft model's cache holds the keys of all tokens that it counts."""
    engine = open_speculating(proposer)
    assert engine.speculator is not None
    drafting = engine.speculator.proposer
    assert isinstance(drafting, DraftProposer)
    for name, prompt in (("a", PERIODIC), ("b", tuple(range(9)))):
        engine.add_request(name, prompt, SamplingParams(max_tokens=40, ignore_eos=True))
    right, compared = True, 0
    while engine.has_work:
        engine.step()
        for sequence in engine.scheduler.running:
            count = min(drafting._state(sequence, engine.pool).tokens, len(sequence.token_ids))
            if count and right:
                cached, fresh = keys(drafting, sequence, count), fresh_keys(drafting, sequence, count)
                right = torch.allclose(cached, fresh, atol=1e-4)
                compared += 1
    assert compared > 0
    return right


def keys(proposer: DraftProposer, sequence: Sequence, count: int) -> torch.Tensor:
    """The last layer's cached keys of a sequence's first `count` tokens."""
    runner, cache = proposer.decoder.layers[-1].runner, proposer.runner.caches[-1]
    return runner.read(cache, torch.tensor(sequence.blocks))[0].flatten(0, 1)[:count]


def fresh_keys(proposer: DraftProposer, sequence: Sequence, count: int) -> torch.Tensor:
    """The same from a forward pass over all of them at once."""
    decoder, cpu = proposer.decoder, torch.device("cpu")
    batch = whole_sequences([count], decoder.limits.block_size, cpu)
    caches = decoder.new_caches(batch.block_table.shape[1])
    decoder.forward(torch.tensor(sequence.token_ids[:count]), torch.arange(count), batch, caches)
    found = decoder.layers[-1].runner.read(caches[-1], batch.block_table[0].long())[0]
    return found.flatten(0, 1)[:count]
