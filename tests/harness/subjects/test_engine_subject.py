"""The engine as a target: tokens are stamped once, an idle poll is short, an abort leaves nothing."""

from __future__ import annotations

import time

from engine_fixtures import open_small

from backbench.harness.subjects.engine import EngineTarget
from backbench.workloads.request import Request


def test_requests_are_answered_token_by_token() -> None:
    target = EngineTarget(open_small())
    before = time.perf_counter_ns()
    sent = target.submit(Request(3, 0, (5, 6, 7), 4))
    assert before <= sent <= time.perf_counter_ns()
    events = []
    while target.engine.has_work:
        events += target.poll(None)
    assert [event.request_id for event in events] == [3] * 4
    assert sum(event.count or 0 for event in events) == 4
    assert [event.finished for event in events] == [False] * 3 + [True]
    assert all(sent < event.time_ns <= time.perf_counter_ns() for event in events)
    assert len(target.steps) >= 4


def test_an_idle_poll_returns_by_its_deadline_and_soon() -> None:
    target = EngineTarget(open_small())
    start = time.perf_counter_ns()
    assert target.poll(start + 10_000_000) == []
    assert time.perf_counter_ns() >= start + 10_000_000
    start = time.perf_counter_ns()
    assert target.poll(start + 60 * 10**9) == []
    assert time.perf_counter_ns() - start < 10**9
    assert target.poll(None) == []


def test_abort_leaves_an_idle_engine() -> None:
    target = EngineTarget(open_small())
    for i in range(5):
        target.submit(Request(i, 0, (i + 1, 2, 3), 50))
    target.poll(None)
    target.abort()
    assert not target.engine.has_work
    assert target.engine.pool.num_used == 0
