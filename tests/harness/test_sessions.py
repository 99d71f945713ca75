"""Later turns: sent their think time after the answer before, whatever the target; never, where it failed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_fixtures import open_small
from hypothesis import given, settings
from hypothesis import strategies as st

from backbench.errors import HarnessError
from backbench.harness.frames import request_frame
from backbench.harness.replay import Replay, replay, salted_warmup
from backbench.harness.run_log import RunLog, reading
from backbench.harness.sessions import Sessions, Trace
from backbench.harness.subjects.engine import EngineTarget
from backbench.harness.subjects.scripted import MS, ScriptedClock, ScriptedTarget
from backbench.harness.subjects.target import TokenEvent
from backbench.reports.metrics.requests import read_requests
from backbench.workloads.request import Request, Workload
from backbench.workloads.statistics import answered_tokens, ideal_prefix_hit_ratio


@dataclass
class TellingTarget(ScriptedTarget):
    """A scripted target that also tells which tokens it made: 1000 * request + place."""

    made: dict[int, int] = field(default_factory=dict)
    prompts: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def submit(self, request: Request) -> int:
        self.prompts[request.id] = request.prompt
        return super().submit(request)

    def poll(self, deadline_ns: int | None) -> list[TokenEvent]:
        found = []
        for event in super().poll(deadline_ns):
            start = self.made.get(event.request_id, 0)
            count = event.count or 0
            self.made[event.request_id] = start + count
            ids = tuple(1000 * event.request_id + start + i for i in range(count))
            found.append(
                TokenEvent(event.request_id, event.time_ns, event.count, ids, event.finished, event.error)
            )
        return found


def chain(
    thinks_ms: list[float],
    first: int = 0,
    arrival_ms: float = 0,
    session: str = "s",
    answer: int = 2,
    own: int = 3,
) -> list[Request]:
    """A session that grows: `own` new tokens a turn, after the context before it."""
    requests: list[Request] = []
    for place, think_ms in enumerate(thinks_ms):
        new = tuple(10 * (first + place) + i for i in range(own))
        if not requests:
            requests.append(Request(first, round(arrival_ms * MS), new, answer, session))
            continue
        before = requests[-1]
        context = (*before.prompt, *([7] * answer))
        requests.append(
            Request(
                first + place,
                0,
                context + new,
                answer,
                session,
                follows=before.id,
                think_ns=round(think_ms * MS),
                extends=before.id,
                kept_tokens=len(context),
            )
        )
    return requests


def intended_ms(done: Replay) -> list[float | None]:
    return [
        None if trace.intended_ns is None else (trace.intended_ns - done.start_ns) / MS
        for trace in done.traces
    ]


def answers(first_ms: float, each_ms: float) -> Any:
    return lambda request: [(first_ms + i * each_ms, 1) for i in range(request.output_tokens)]


@pytest.mark.parametrize("first_ms", [1, 50, 700])
@pytest.mark.parametrize("concurrency", [None, 1, 4])
@pytest.mark.parametrize("arrival_ms", [0, 40])
def test_a_turn_comes_its_think_time_after_the_answer(
    clock: ScriptedClock, first_ms: float, concurrency: int | None, arrival_ms: float
) -> None:
    """In an open loop, a closed one and all at once, and whatever the target's speed."""
    requests = chain([0, 100, 0, 5], arrival_ms=0 if concurrency else arrival_ms)
    target = ScriptedTarget(clock, answers(first_ms, 10))
    done = replay(target, Workload("w", tuple(requests), concurrency), clock=clock)
    assert done.mode == ("closed" if concurrency else "open" if arrival_ms else "all_at_once")
    start = 0 if concurrency else arrival_ms
    took = first_ms + 10
    expected = [start, start + took + 100, start + 2 * took + 100, start + 3 * took + 105]
    assert intended_ms(done) == pytest.approx(expected)
    assert [trace.sent_ns for trace in done.traces] == [trace.intended_ns for trace in done.traces]
    assert all(trace.finished for trace in done.traces)


def test_prompts_hold_the_real_answers(clock: ScriptedClock) -> None:
    target = TellingTarget(clock, answers(5, 1))
    done = replay(target, Workload("w", tuple(chain([0, 1, 1]))), clock=clock)
    assert target.prompts[1] == (0, 1, 2, 0, 1, 10, 11, 12)
    assert target.prompts[2] == (0, 1, 2, 0, 1, 10, 11, 12, 1000, 1001, 20, 21, 22)
    assert done.traces[2].request.prompt == target.prompts[2]


def test_a_target_that_tells_no_tokens_leaves_the_planned_answer(clock: ScriptedClock) -> None:
    requests = chain([0, 1, 1])
    done = replay(ScriptedTarget(clock, answers(5, 1)), Workload("w", tuple(requests)), clock=clock)
    assert [trace.request for trace in done.traces] == requests


def test_a_shorter_answer_makes_the_prompts_shorter_and_none_outgrows_its_plan(clock: ScriptedClock) -> None:
    requests = chain([0, 1, 1], answer=3)
    script = {0: [(5, 1)], 1: [(5, 5)], 2: [(5, 3)]}
    target = TellingTarget(clock, lambda request: script[request.id])
    done = replay(target, Workload("w", tuple(requests)), clock=clock)
    assert target.prompts[1] == (0, 1, 2, 0, 10, 11, 12)
    assert target.prompts[2][:7] == target.prompts[1]
    assert target.prompts[2][7:10] == (1000, 1001, 1002) and target.prompts[2][-3:] == (20, 21, 22)
    assert all(
        len(trace.request.prompt) <= len(planned.prompt)
        for trace, planned in zip(done.traces, requests, strict=True)
    )


def test_a_slot_is_kept_by_a_session_through_its_think_times(clock: ScriptedClock) -> None:
    """Concurrency counts users: nobody else begins while the first one thinks."""
    requests = chain([0, 500], session="a") + chain([0], first=2, session="b")
    done = replay(ScriptedTarget(clock, answers(10, 0)), Workload("w", tuple(requests), 1), clock=clock)
    assert intended_ms(done) == [0, 510, 520]
    done = replay(ScriptedTarget(clock, answers(10, 0)), Workload("w", tuple(requests), 2), clock=clock)
    assert intended_ms(done) == [0, 510, 0]


def test_an_open_loop_begins_sessions_on_time_however_long_others_last(clock: ScriptedClock) -> None:
    requests = chain([0, 10], session="a") + chain([0, 10], first=2, arrival_ms=50, session="b")
    done = replay(ScriptedTarget(clock, answers(200, 0)), Workload("w", tuple(requests)), clock=clock)
    assert intended_ms(done) == [0, 210, 50, 260]


def test_a_turn_with_a_time_of_its_own_waits_only_where_it_would_come_too_soon(clock: ScriptedClock) -> None:
    first, early, late = (
        Request(0, 0, (1,), 1),
        Request(1, 50 * MS, (2,), 1, follows=0),
        Request(2, 900 * MS, (3,), 1, follows=1),
    )
    done = replay(ScriptedTarget(clock, answers(100, 0)), Workload("w", (first, early, late)), clock=clock)
    assert intended_ms(done) == [0, 100, 900]


def test_turns_of_one_answer_go_on_side_by_side_and_a_join_waits_for_its_last(clock: ScriptedClock) -> None:
    """A subagent's turn decides when its parent goes on; the parent's context is still its own."""
    main, sub = chain([0, 1])
    sub = Request(1, 0, (50, 51), 2, "s", follows=0, think_ns=3 * MS)
    after = Request(
        2, 0, (*main.prompt, 7, 7, 99), 2, "s", follows=1, think_ns=4 * MS, extends=0, kept_tokens=5
    )
    target = TellingTarget(clock, answers(10, 0))
    done = replay(target, Workload("w", (main, sub, after)), clock=clock)
    assert intended_ms(done) == [0, 13, 27]
    assert target.prompts[2] == (0, 1, 2, 0, 1, 99)


def test_a_failed_turn_ends_its_session_and_no_other(clock: ScriptedClock, make_context: Any) -> None:
    requests = chain([0, 5, 5, 5], session="a") + chain([0, 5], first=4, session="b")
    script = {request.id: [(10, 2)] for request in requests} | {1: [("error", 20)]}
    target = ScriptedTarget(clock, lambda request: script[request.id])
    seen: list[int] = []
    done = replay(
        target,
        Workload("w", tuple(requests), 1),
        clock=clock,
        on_trace=lambda trace: seen.append(trace.request.id) if trace.end_ns is not None else None,
    )
    assert [trace.finished for trace in done.traces] == [True, False, False, False, True, True]
    assert [trace.sent_ns is None for trace in done.traces] == [False, False, True, True, False, False]
    why = "not sent: request 1, an earlier turn of its session, failed"
    assert [trace.error for trace in done.traces[1:4]] == ["refused", why, why]
    assert intended_ms(done) == [0, 15, 35, 35, 35, 50]
    assert seen == [0, 1, 2, 3, 4, 5]
    frame = request_frame(done)
    assert frame["turn"].tolist() == [1, 2, 3, 4, 1, 2]
    assert frame["follows"].dropna().tolist() == [0, 1, 2, 4]
    assert frame["think_ns"].dropna().tolist() == [5 * MS] * 4
    rows = read_requests(frame, make_context(mode="closed"))
    assert int(rows.failed.sum()) == 3 and np.isnan(rows.sent_ns).sum() == 2


def test_a_warm_up_holds_none_of_a_sessions_tokens_and_follows_nobody(clock: ScriptedClock) -> None:
    workload = Workload("w", tuple(chain([0, 5, 5])), 1)
    warmup = salted_warmup(workload, 3, 100, 0)
    assert all(each.follows is None and each.kept_tokens == 0 for each in warmup)
    assert [len(each.prompt) for each in warmup] == [len(each.prompt) for each in workload.requests]
    done = replay(ScriptedTarget(clock, answers(10, 0)), workload, warmup=warmup, clock=clock)
    assert all(trace.finished for trace in (*done.warmup, *done.traces))


def test_what_follows_a_later_request_is_refused() -> None:
    with pytest.raises(HarnessError, match="Request 0 follows request 1, which is not before it"):
        Sessions([Trace(Request(0, 0, (1,), 1, follows=1)), Trace(Request(1, 0, (1,), 1))])


def test_an_interrupted_session_is_logged_and_comes_back(tmp_path: Path, clock: ScriptedClock) -> None:
    requests = chain([0, 5, 5], session="a", arrival_ms=1) + chain([0, 5], 3, session="b")
    workload = Workload("w", tuple(requests))
    script: dict[int, Any] = {0: [(10, 2)], 1: [("error", 20)], 3: [(4, 1)], 4: [(9, 2)]}
    target = TellingTarget(clock, lambda request: script[request.id])
    log = RunLog.claim(tmp_path / "run")
    log.begin({"run": {}}, workload, (), clock)
    with log:
        done = replay(target, workload, clock=clock, on_trace=log.note)
    log.release()
    with reading(tmp_path / "run") as (_, back):
        for before, after in zip(done.traces, back.traces, strict=True):
            assert (after.intended_ns, after.sent_ns, after.end_ns) == (
                before.intended_ns,
                before.sent_ns,
                before.end_ns,
            )
            assert (after.error, len(after.request.prompt)) == (before.error, len(before.request.prompt))
            assert (after.request.follows, after.request.think_ns) == (
                before.request.follows,
                before.request.think_ns,
            )
        assert len(back.traces[4].request.prompt) == 3 + 1 + 3, "its session's answer was one token short"
        columns = ["session", "turn", "follows", "think_ns", "prompt_tokens", "error"]
        assert request_frame(back)[columns].equals(request_frame(done)[columns])


@st.composite
def session_workloads(draw: Any) -> tuple[Workload, dict[int, Any]]:
    """Trees of turns with their target's script: any speed, and failures anywhere."""
    count = draw(st.integers(1, 25))
    requests: list[Request] = []
    script: dict[int, Any] = {}
    closed = draw(st.booleans())
    for index in range(count):
        follows = draw(st.none() | st.integers(0, index - 1)) if index else None
        timed = not closed and draw(st.booleans())
        arrival_ns = draw(st.integers(0, 300)) * MS if timed else 0
        think_ns = 0 if follows is None else draw(st.integers(0, 50)) * MS
        extends = follows if draw(st.booleans()) else None
        kept = 0 if extends is None else min(draw(st.integers(0, 6)), 4)
        prompt = tuple(draw(st.lists(st.integers(0, 9), min_size=4, max_size=6)))
        requests.append(
            Request(
                index,
                arrival_ns,
                prompt,
                2,
                follows=follows,
                think_ns=think_ns,
                extends=extends,
                kept_tokens=kept,
            )
        )
        fails = draw(st.integers(0, 5)) == 0
        took = draw(st.integers(0, 200))
        script[index] = [("error", took)] if fails else [(took, 1), (took + 1, draw(st.integers(0, 3)))]
    concurrency = draw(st.integers(1, 4)) if closed else None
    return Workload("w", tuple(requests), concurrency), script


@settings(deadline=None, max_examples=150)
@given(session_workloads(), st.integers(1, 5), st.integers(0, 30))
def test_whatever_fails_every_request_ends_and_every_think_time_is_kept(
    made: tuple[Workload, dict[int, Any]], slots: int, submit_ms: int
) -> None:
    workload, script = made
    clock = ScriptedClock()
    target = TellingTarget(clock, lambda request: script[request.id], slots, submit_ms)
    done = replay(target, workload, clock=clock)
    assert not done.interrupted and done.failure is None
    for trace in done.traces:
        assert trace.end_ns is not None and trace.intended_ns is not None
        request = trace.request
        if request.follows is None:
            assert trace.sent_ns is not None
            continue
        before = done.traces[request.follows]
        assert before.end_ns is not None
        if before.error is not None:
            assert trace.sent_ns is None and trace.error is not None and "not sent" in trace.error
            continue
        due_ns = before.end_ns + request.think_ns
        if request.arrival_ns and done.mode == "open":
            due_ns = max(due_ns, done.start_ns + request.arrival_ns)
        assert trace.intended_ns == due_ns
        assert trace.sent_ns is not None and trace.sent_ns >= due_ns
        assert len(request.prompt) <= len(workload.requests[request.id].prompt)
    if workload.concurrency is not None:
        _require_few_at_once(done, workload.concurrency)


def _require_few_at_once(done: Replay, most: int) -> None:
    """No more sessions at any time than there are slots: each from its first sending to its last end."""
    first: dict[int, int] = {}
    spans: dict[int, list[int]] = {}
    for trace in done.traces:
        request = trace.request
        first[request.id] = request.id if request.follows is None else first[request.follows]
        assert trace.end_ns is not None and trace.intended_ns is not None
        span = spans.setdefault(first[request.id], [trace.intended_ns, trace.end_ns])
        span[1] = max(span[1], trace.end_ns)
    for begin, _ in spans.values():
        going = sum(start <= begin < end for start, end in spans.values())
        assert going <= most


def test_an_engine_finds_its_own_answers_in_its_cache() -> None:
    """Realised hits are the ideal ones, of what was planned and of what was really sent, block for block."""
    first = chain([0, 1, 0, 2], session="a", answer=9, own=7)
    other = chain([0, 3, 0], first=4, session="b", answer=6, own=10)
    workload = Workload("w", tuple(first + other), 1)
    target = EngineTarget(open_small())
    done = replay(target, workload)
    assert all(trace.finished for trace in done.traces)
    sent = [trace.request for trace in done.traces]
    assert sent != list(workload.requests), "the model's answers are in the prompts"
    hits = sum(step.prefix_hit_tokens for step in target.steps)
    found = hits / (hits + sum(step.num_prefill_tokens for step in target.steps))
    for requests in (sent, workload.requests):
        prompts = [request.prompt for request in requests]
        assert ideal_prefix_hit_ratio(prompts, 4, answered_tokens(requests)) == pytest.approx(found)
    assert found > 0.5
