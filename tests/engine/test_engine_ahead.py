"""Steps launched ahead of their inputs change no token, on a device that reads inputs as late as it may.

Right guesses, and every wrong one: prompts that arrive, requests that end or are aborted, preemptions, plain
steps in between, exceptions. A gate that nobody opens fails (`late_device`). The faults it must find are
planted below.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_fixtures import VOCAB, WordTokenizer, open_small
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from late_device import LateGate, make_late
from speculation_fixtures import check_books, open_speculating
from traffic import alone, engines, serve

from backbench.engine.async_engine import AsyncEngine
from backbench.engine.engine import Engine, InFlight
from backbench.engine.execution.ahead import SURE, Armed
from backbench.engine.execution.runner import Runner
from backbench.engine.execution.step_buffers import Staging, StepBuffers
from backbench.engine.execution.step_shape import FEW_DRAFTED
from backbench.engine.request import SamplingParams, Token
from backbench.engine.scheduling.blocks import BlockPool
from backbench.engine.scheduling.scheduler import StepPlan
from backbench.engine.scheduling.sequence import Sequence
from backbench.engine.speculation.proposer import Proposer

PROMPT = tuple([5, 9, 2] * 4)
LONG = SamplingParams(max_tokens=60, ignore_eos=True, temperature=0.9, seed=3)


def knows(sequence: Sequence) -> list[int]:
    prompt = tuple(sequence.token_ids[: sequence.prompt_len])
    return list(alone(prompt, sequence.params, sequence.index)[0])


class Steady(Proposer):
    """Drafts the true output with one token wrong, always as long as it may: each step is like the last."""

    def __init__(self) -> None:
        self.asked = 0

    def propose(self, plan: StepPlan, rooms: list[int], pool: BlockPool) -> list[list[int]]:
        self.asked += 1
        found = []
        for part, room in zip(plan.slices, rooms, strict=False):
            done = len(part.sequence.token_ids) - part.sequence.prompt_len
            drafted = [*knows(part.sequence)[done : done + room], *[0] * room][:room]
            if self.asked % 3 < room:
                drafted[self.asked % 3] = (drafted[self.asked % 3] + 1) % VOCAB
            found.append(drafted)
        return found


def open_ahead(proposer: str = "steady", *, sure: float = -1.0, **how: Any) -> Engine:
    """sure: the share of right guesses above which a step is launched ahead."""
    engine = open_speculating(
        "ngram" if proposer == "steady" else proposer, knows=knows, tokenizer=WordTokenizer(), **how
    )
    assert engine.speculator is not None
    if proposer == "steady":
        engine.speculator.proposer = Steady()
    make_late(engine, graphs=True)
    engine.max_steps_in_flight = 1
    engine.runner.ahead.sure = sure
    return engine


def go_on(engine: Engine, got: dict[str, list[int]], until: Callable[[], Any] = lambda: False) -> None:
    """Step until something holds or nothing is left to do; collect what comes."""
    while engine.has_work and not until():
        for token in engine.step():
            got.setdefault(token.request_id, []).append(token.token_id)
        assert armed(engine) is None, "nobody meets a closed gate between two steps"


def armed(engine: Engine) -> Armed | None:
    return engine.runner.ahead.armed


def under_way(engine: Engine) -> bool:
    """Whether a step that was launched ahead has not landed yet."""
    return any(each.step.armed_ns > 0 for each in engine._in_flight)


def expect_idle(engine: Engine) -> None:
    """Nothing is armed, and the device gets through all that it was given."""
    assert armed(engine) is None
    engine.runner.queue.mark().synchronize()


def test_a_long_answer_is_launched_ahead() -> None:
    engine, got = open_ahead(sure=SURE), dict[str, list[int]]()
    engine.add_request("a", PROMPT, LONG)
    go_on(engine, got)
    assert got["a"] == alone(PROMPT, LONG, 0)[0]
    steps = engine.take_step_stats()
    drafted = sum(bool(step.draft_lengths) for step in steps)
    used = engine.describe()["steps_launched_ahead"]
    assert used >= drafted - 8 > 5
    assert engine.describe()["steps_launched_in_vain"] == 0, "the end of an answer is known before"
    assert engine.describe()["not_launched_ahead"] is None
    assert all(step.graph for step in steps)
    expect_idle(engine)


def test_several_sequences_with_log_probabilities() -> None:
    params = SamplingParams(max_tokens=30, ignore_eos=True, temperature=0.7, seed=1, n=3, logprobs=True)
    engine = open_ahead()
    done = engine.generate([PROMPT, (1, 2, 3)], params)
    plain = open_small(tokenizer=WordTokenizer()).generate([PROMPT, (1, 2, 3)], params)
    assert [each.token_ids for each in done] == [each.token_ids for each in plain]
    assert [each.top_tokens for each in done] == [each.top_tokens for each in plain]
    for each, expected in zip(done, plain, strict=True):
        assert each.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
    assert engine.runner.ahead.used > 3
    expect_idle(engine)


def test_a_prompt_that_arrives_waits_for_the_step_under_way() -> None:
    engine, got = open_ahead(), dict[str, list[int]]()
    engine.add_request("a", PROMPT, LONG)
    go_on(engine, got, lambda: under_way(engine))
    engine.add_request("b", (1, 2, 3), LONG)
    go_on(engine, got)
    assert got == {"a": alone(PROMPT, LONG, 0)[0], "b": alone((1, 2, 3), LONG, 0)[0]}
    assert engine.runner.ahead.wasted == 0, "nothing is guessed while one waits"
    expect_idle(engine)


def noted_plans(engine: Engine) -> list[tuple[StepPlan, bool]]:
    """The plans that are launched from here on, and whether each is of the shape of a step that was armed."""
    plans, launch, runner = list[tuple[StepPlan, bool]](), engine.runner.launch, engine.runner

    def noted(plan: StepPlan) -> Any:
        step = armed(engine)
        plans.append((plan, step is not None and runner._captured_shape(plan) == step.inputs.shape))
        return launch(plan)

    runner.launch = noted  # type: ignore[method-assign]
    return plans


def test_a_step_of_the_same_shape_and_another_graph_is_a_wrong_guess() -> None:
    """Three greedy sequences and a sampled one, whose stop token nobody foresees: all are laid out alike."""
    greedy = SamplingParams(max_tokens=40, ignore_eos=True)
    output = alone((1,), LONG, 0)[0]
    stop = next(token for i, token in enumerate(output) if i > 12 and token not in output[:i])
    engine, got = open_ahead(), dict[str, list[int]]()
    for name in "abc":
        engine.add_request(name, PROMPT, greedy)
    engine.add_request("d", (1,), replace(LONG, stop_token_ids=(stop,)))
    plans = noted_plans(engine)
    go_on(engine, got)
    lengths = [(len(plan.slices), alike) for plan, alike in plans]
    assert (4, True) in lengths and lengths[lengths.index((4, True)) :].count((3, True)) > 1
    assert engine.runner.ahead.wasted > 0
    assert got["a"] == alone(PROMPT, greedy, 0)[0]
    assert got["d"] == output[: output.index(stop) + 1]


def test_a_step_that_copies_blocks_is_a_wrong_guess() -> None:
    """The last token of a prompt in chunks is as a decode; then the prompt is forked inside a block."""
    engine, got = open_ahead(prefill_chunk=5), dict[str, list[int]]()
    for name in "ab":
        engine.add_request(name, PROMPT, LONG)
    go_on(engine, got, lambda: under_way(engine))
    plans, params = noted_plans(engine), SamplingParams(max_tokens=20, n=2, temperature=1.0, ignore_eos=True)
    prompt = (7, 7, 3, 1, 4, 2)
    done = engine.generate([prompt], params)
    assert any(plan.copies and alike for plan, alike in plans)
    assert [each.token_ids for each in done] == [alone(prompt, params, index)[0] for index in range(2)]


@pytest.mark.parametrize("others", [False, True])
def test_abort_while_one_is_under_way(others: bool) -> None:
    engine, got = open_ahead(), dict[str, list[int]]()
    engine.add_request("a", PROMPT, LONG)
    if others:
        engine.add_request("b", (1, 2, 3), LONG)
    go_on(engine, got, lambda: under_way(engine))
    engine.abort("a")
    if not others:
        expect_idle(engine)
        assert engine.pool.num_used == 0
    engine.add_request("c", PROMPT, LONG)
    go_on(engine, got)
    assert got["c"] == alone(PROMPT, LONG, 0)[0]
    assert not others or got["b"] == alone((1, 2, 3), LONG, 0)[0]
    expect_idle(engine)


def test_an_answer_that_stops_early_leaves_an_idle_engine() -> None:
    output = alone(PROMPT, LONG, 0)[0]
    stop = next(token for i, token in enumerate(output) if i > 8 and token not in output[:i])
    params = SamplingParams(max_tokens=60, temperature=0.9, seed=3, ignore_eos=True, stop_token_ids=(stop,))
    engine, got = open_ahead(), dict[str, list[int]]()
    engine.add_request("a", PROMPT, params)
    go_on(engine, got)
    assert got["a"] == output[: output.index(stop) + 1]
    assert engine.runner.ahead.wasted == 1
    expect_idle(engine)


def test_who_does_not_come_again_finds_no_gate_closed() -> None:
    """After a step, after `generate` beside another request, and after `close`."""
    engine, got = open_ahead(), dict[str, list[int]]()
    engine.add_request("a", PROMPT, LONG)
    go_on(engine, got, lambda: under_way(engine))
    expect_idle(engine)
    done = engine.generate([(1, 2, 3)], SamplingParams(max_tokens=20, ignore_eos=True))
    expect_idle(engine)
    assert done[0].token_ids == alone((1, 2, 3), SamplingParams(max_tokens=20, ignore_eos=True), 0)[0]
    go_on(engine, got, lambda: under_way(engine))
    engine.close()
    expect_idle(engine)
    go_on(engine, got)
    assert got["a"] == alone(PROMPT, LONG, 0)[0]


def test_leaving_a_stream_early_leaves_nothing_armed() -> None:
    engine = open_ahead()

    async def main() -> int:
        async with AsyncEngine(engine) as front:
            tokens = front.stream(PROMPT, LONG)
            seen = 0
            async for _ in tokens:
                seen += 1
                if seen == 9:
                    break
            await tokens.aclose()
        return seen

    assert asyncio.run(main()) == 9
    assert engine.runner.ahead.used > 0
    expect_idle(engine)


@pytest.mark.parametrize("place", ["landed", "_launch"])
def test_a_step_that_fails_leaves_no_gate_closed(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = open_ahead()
    engine.add_request("a", PROMPT, LONG)
    go_on(engine, {}, lambda: under_way(engine))

    def broken(*_: Any) -> None:
        assert armed(engine), "the step after this one"
        raise ZeroDivisionError

    monkeypatch.setattr(engine.requests if place == "landed" else engine, place, broken)
    with pytest.raises(ZeroDivisionError):
        engine.step()
    expect_idle(engine)


def test_a_fill_that_fails_half_way_runs_nothing() -> None:
    """And neither does any step in vain: caches, block table and last tokens stay as they were."""
    engine = open_ahead()
    engine.add_request("a", PROMPT, LONG)
    go_on(engine, {}, lambda: under_way(engine))
    runner = engine.runner

    def seen() -> list[torch.Tensor]:
        tables = runner._eager.tables
        kept = [each[:-1] for cache in runner.caches for each in (cache.keys, cache.values)]
        return [each.clone() for each in (*kept, tables.last_tokens[:-1], tables.blocks[:-1])]

    before = list[torch.Tensor]()

    def broken(*_: Any) -> None:
        before.extend(seen())
        raise ZeroDivisionError

    runner._captured._fill_sampling = broken  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        engine.step()
    expect_idle(engine)
    assert before and all(map(torch.equal, before, seen()))


@pytest.mark.parametrize("asked", [0, 1])
def test_a_plain_step_behind_one_in_vain_is_no_measurement(asked: int) -> None:
    """A step with drafts is one: what drafting wastes is its own."""
    engine = open_ahead()
    speculator = engine.speculator
    assert speculator is not None
    plain, drafted = list[int](), list[int]()
    speculator.length.observe_plain = lambda *seen: plain.append(seen[0])  # type: ignore[method-assign]
    speculator.length.observe_drafted = lambda *seen: drafted.append(seen[1])  # type: ignore[method-assign]
    engine.add_request("a", PROMPT, LONG)
    go_on(engine, {}, lambda: under_way(engine))
    speculator.choose = lambda running: asked  # type: ignore[method-assign]
    engine.step()
    assert engine.runner.ahead.wasted == 1
    plain.clear()
    drafted.clear()
    engine.step()
    assert (plain, drafted) == ([], [1] if asked else [])
    engine.step()
    assert len(plain) == 1 - asked


def test_the_devices_time_begins_behind_the_gate() -> None:
    engine = open_ahead()
    queue, seen = engine.runner.queue, list[str]()

    def noting(name: str) -> Callable[..., Any]:
        real = getattr(queue, name)

        def noted(*given: Any) -> Any:
            seen.append(name)
            return real(*given)

        return noted

    for name in ("gate", "submit", "mark", "stretch"):
        setattr(queue, name, noting(name))
    engine.add_request("a", PROMPT, LONG)
    go_on(engine, {}, lambda: under_way(engine))
    gate = len(seen) - 1 - seen[::-1].index("gate")
    # The gate itself, the copy of the inputs and its mark; then the time begins: the graph, the end.
    assert seen[gate:] == ["gate", "submit", "submit", "mark", "stretch", "submit", "mark"]


def test_the_hosts_time_of_launching_ahead_is_the_steps_own(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = open_ahead()
    engine.add_request("a", PROMPT, LONG)
    go_on(engine, {}, lambda: under_way(engine))
    land = engine._land

    def landing(landed: InFlight) -> list[Token]:
        step = armed(engine)
        assert step is not None and step.host_ns > 0
        object.__setattr__(step, "host_ns", 10**12)
        return land(landed)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_land", landing)
        engine.step()
    engine.take_step_stats()
    engine.step()
    (stats,) = engine.take_step_stats()
    assert stats.host_ns > 10**12
    assert stats.end_ns - stats.start_ns < 10**12


@pytest.mark.parametrize("proposer", ["draft of one layer", "draft that is the target"])
def test_a_model_that_drafts_never_meets_a_closed_gate(proposer: str) -> None:
    engine = open_ahead(proposer)
    done = engine.generate([PROMPT], LONG)
    assert done[0].token_ids == alone(PROMPT, LONG, 0)[0]
    assert engine.describe()["not_launched_ahead"] == "the model that drafts needs the device"
    assert (engine.runner.ahead.used, engine.runner.ahead.wasted) == (0, 0)


def test_what_a_cpu_says() -> None:
    engine = open_small(speculate="ngram:3")
    assert engine.describe()["not_launched_ahead"] == "no steps are captured"
    assert "not_launched_ahead" not in open_small().describe()


@pytest.mark.parametrize("proposer", ["steady", "one that knows", "ngram"])
def test_traffic_of_every_kind_equals_each_sequence_alone(proposer: str) -> None:
    seen = [0, 0]

    @settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        engines(), st.sampled_from([-1.0, SURE]), st.booleans(), st.sampled_from([0, FEW_DRAFTED]), st.data()
    )
    def run(
        setting: dict[str, Any], sure: float, switching: bool, few_drafted: int, data: st.DataObject
    ) -> None:
        setting["num_blocks"] += 4  # for longer answers
        engine = open_ahead(proposer, sure=sure, **setting)
        engine.runner.few_drafted = few_drafted
        speculator, step = engine.speculator, engine.step
        assert speculator is not None
        if switching:  # plain steps in between, two of them in flight
            engine.max_steps_in_flight = 2
            choices = data.draw(st.randoms(use_true_random=False))
            speculator.choose = lambda running: choices.choice([0, 3, 3, 3])  # type: ignore[method-assign]

        def checked() -> Any:
            tokens = step()
            if not engine._in_flight:
                check_books(engine)
            return tokens

        engine.step = checked  # type: ignore[method-assign, assignment]
        for asked in serve(engine, data, lengths=(4, 20)):
            asked.check()
        expect_idle(engine)
        assert engine.pool.num_used == 0
        seen[0] += engine.runner.ahead.used
        seen[1] += engine.runner.ahead.wasted

    run()
    assert min(seen) > 0 or proposer == "ngram", seen


# Planted faults: each is caught by what passes without it.


def is_right() -> bool:
    engine, got = open_ahead(), dict[str, list[int]]()
    engine.add_request("a", PROMPT, LONG)
    go_on(engine, got)
    return got["a"] == alone(PROMPT, LONG, 0)[0]


def test_inputs_that_are_not_written_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_right()
    write = Runner._written

    def forgets(self: Runner, step: Armed, plan: StepPlan, shape: Any) -> Any:
        inputs = write(self, step, plan, shape)
        self._captured.fill_inert(step.inputs.shape, step.staging)
        return inputs

    monkeypatch.setattr(Runner, "_written", forgets)
    assert not is_right()


def test_a_gate_that_is_never_opened_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LateGate, "open", lambda self: None)
    with pytest.raises(AssertionError, match="waits for a device that waits"):
        is_right()


def test_a_buffer_that_a_step_in_flight_reads_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def the_same(self: StepBuffers) -> Staging:
        return self._stagings[0]

    monkeypatch.setattr(StepBuffers, "_next_staging", the_same)
    assert not is_right()
