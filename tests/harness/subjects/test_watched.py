"""A target that says nothing is a failed one, after a limit and no sooner."""

from __future__ import annotations

import signal
import time
from typing import Any

import pytest

from backbench.errors import HarnessError
from backbench.harness.replay import replay
from backbench.harness.subjects.scripted import ScriptedClock, ScriptedTarget
from backbench.harness.subjects.target import TokenEvent
from backbench.harness.subjects.watched import Watched

S = 1_000_000_000


class Silent(ScriptedTarget):
    """Answers until it has given `tokens`; each later poll takes a second and finds nothing."""

    tokens = 1

    def poll(self, deadline_ns: int | None) -> list[TokenEvent]:
        if self.tokens:
            self.tokens -= 1
            return super().poll(deadline_ns)
        self.clock.now_ns += S
        return []


def silent(clock: ScriptedClock) -> Silent:
    return Silent(clock, lambda request: [(1, 1), (2, 1)])


def test_a_silent_target_fails_and_what_it_said_is_kept(make_workload: Any, clock: Any) -> None:
    begin_ns = clock()
    with Watched(silent(clock), 30.0, clock) as watched:
        done = replay(watched, make_workload([2, 2]), clock=clock)
    assert done.interrupted and isinstance(done.failure, HarnessError)
    assert "stalled: 2 requests in flight and no token for 30 s" in str(done.failure)
    assert 30 < (clock() - begin_ns) / 1e9 < 33
    assert sum(len(trace.chunk_ns) for trace in done.traces) == 2


def test_a_target_that_only_takes_steps_is_at_work(make_workload: Any, clock: Any) -> None:
    """A long prompt is computed in many steps, none of which gives a token."""
    target = silent(clock)
    watched = Watched(target, 5.0, clock)
    for request in make_workload([2]).requests:
        watched.submit(request)
    watched.poll(None)
    for _ in range(20):
        target.steps.append(None)  # type: ignore[arg-type]
        assert watched.poll(None) == []
    with pytest.raises(HarnessError, match="stalled"):
        for _ in range(7):
            watched.poll(None)


def test_an_idle_target_may_be_silent(make_workload: Any, clock: Any) -> None:
    """Between two arrivals an hour apart nothing is in flight; the wait for the second begins with it."""
    target = ScriptedTarget(clock, lambda request: [(1, 1)])
    with Watched(target, 2.0, clock) as watched:
        done = replay(watched, make_workload([1, 1], [0.0, 3.6e6]), clock=clock)
    assert not done.interrupted and all(trace.finished for trace in done.traces)


def test_a_call_that_does_not_return_is_interrupted(make_workload: Any) -> None:
    class Stuck(ScriptedTarget):
        def poll(self, deadline_ns: int | None) -> list[TokenEvent]:
            time.sleep(60)
            return []

    before = signal.getsignal(signal.SIGALRM)
    earlier_s = signal.setitimer(signal.ITIMER_REAL, 250.0)[0]  # the test runner's own, where it has one
    target = Stuck(ScriptedClock(), lambda request: [(1, 1)])
    begin_s = time.monotonic()
    with Watched(target, 0.2, time.perf_counter_ns) as watched:
        done = replay(watched, make_workload([1]))
    assert time.monotonic() - begin_s < 10
    assert "stalled: 1 requests" in str(done.failure)
    assert signal.getsignal(signal.SIGALRM) is before
    assert 200 < signal.setitimer(signal.ITIMER_REAL, earlier_s)[0] < 250, "another's alarm goes on"
