"""Replay: when requests are offered, and what is stamped."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import pytest

from backbench.errors import HarnessError
from backbench.harness.replay import Progress, Replay, replay, salted_warmup
from backbench.harness.subjects.target import TokenEvent
from backbench.harness.switching import SWITCH_S
from backbench.workloads.request import Request, Workload

MS = 1_000_000


def intended_ms(done: Replay) -> list[float]:
    return [
        (trace.intended_ns - done.start_ns) / MS for trace in done.traces if trace.intended_ns is not None
    ]


def sent_ms(done: Replay) -> list[float]:
    return [(trace.sent_ns - done.start_ns) / MS for trace in done.traces if trace.sent_ns is not None]


def test_open_loop_keeps_the_workloads_times(make_target: Any, make_workload: Any, clock: Any) -> None:
    workload = make_workload([1, 1, 1], arrivals_ms=[0, 30, 40])
    target = make_target({i: [(100, 1)] for i in range(3)}, submit_ms=25)
    done = replay(target, workload, clock=clock)
    assert intended_ms(done) == [0, 30, 40]
    assert sent_ms(done) == [25, 55, 80]
    assert done.mode == "open"
    assert not done.interrupted


def test_open_loop_first_arrival_may_be_late(make_target: Any, make_workload: Any, clock: Any) -> None:
    workload = make_workload([1, 1], arrivals_ms=[50, 60])
    done = replay(make_target({0: [(5, 1)], 1: [(5, 1)]}), workload, clock=clock)
    assert intended_ms(done) == [50, 60]


def test_closed_loop_sends_when_a_slot_is_free(make_target: Any, make_workload: Any, clock: Any) -> None:
    workload = make_workload([1] * 4, concurrency=2)
    target = make_target({0: [(10, 1)], 1: [(30, 1)], 2: [(10, 1)], 3: [(10, 1)]})
    done = replay(target, workload, clock=clock)
    assert intended_ms(done) == [0, 0, 10, 20]
    assert target.most_in_flight == 2


def test_all_at_once(make_target: Any, make_workload: Any, clock: Any) -> None:
    target = make_target({i: [(10, 1)] for i in range(5)})
    done = replay(target, make_workload([1] * 5), clock=clock)
    assert done.mode == "all_at_once"
    assert intended_ms(done) == sent_ms(done) == [0] * 5


def test_every_chunk_is_stamped_and_empty_ones_are_not(
    make_target: Any, make_workload: Any, clock: Any
) -> None:
    target = make_target({0: [(5, 0), (10, 1), (30, 3), (31, 0)]})
    (trace,) = replay(target, make_workload([4]), clock=clock).traces
    assert trace.sent_ns is not None
    assert [(at - trace.sent_ns) / MS for at in trace.chunk_ns] == [10, 30]
    assert trace.chunk_tokens == [1, 3]
    assert trace.finished


def test_a_failure_frees_its_slot(make_target: Any, make_workload: Any, clock: Any) -> None:
    target = make_target({0: [("error", 7)], 1: [(10, 1)]})
    done = replay(target, make_workload([1, 1], concurrency=1), clock=clock)
    assert [trace.error for trace in done.traces] == ["refused", None]
    assert intended_ms(done) == [0, 7]


def test_interruption_keeps_what_was_measured(make_target: Any, make_workload: Any, clock: Any) -> None:
    target = make_target({i: [(10, 1)] for i in range(9)}, interrupt_at_ms=25)
    done = replay(target, make_workload([1] * 9, concurrency=1), clock=clock)
    assert done.interrupted
    assert not target.aborted, "it was interrupted inside a call, so its state is unknown"
    assert [trace.finished for trace in done.traces].count(True) == 3
    assert done.traces[-1].sent_ns is None


class SignalTarget:
    """Sends this process SIGINT at its third poll, as a terminal's Ctrl-C does."""

    def __init__(self) -> None:
        self.polls = 0
        self.aborted = False
        self.flying: list[int] = []

    def submit(self, request: Request) -> int:
        self.flying.append(request.id)
        return request.id

    def poll(self, deadline_ns: int | None) -> list[TokenEvent]:
        self.polls += 1
        if self.polls == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return [TokenEvent(self.flying.pop(0), self.polls, 1, finished=True)]

    def abort(self) -> None:
        self.aborted = True


def test_ctrl_c_ends_between_two_polls(make_workload: Any) -> None:
    before = signal.getsignal(signal.SIGINT)
    target = SignalTarget()
    done = replay(target, make_workload([1] * 10, concurrency=1))
    assert done.interrupted
    assert target.polls == 3
    assert target.aborted
    assert sum(trace.finished for trace in done.traces) == 3
    assert signal.getsignal(signal.SIGINT) is before


def test_progress_counts_measured_requests(make_target: Any, make_workload: Any, clock: Any) -> None:
    workload = make_workload([2, 2], concurrency=1)
    seen: list[Progress] = []
    warmup = salted_warmup(workload, 1, 100, 0)
    target = make_target({i: [(10, 1), (20, 1)] for i in (-1, 0, 1)})
    replay(target, workload, warmup=warmup, clock=clock, on_progress=seen.append)
    assert seen[-1] == Progress(2, 2, 4, 0, pytest.approx(0.04))


def test_an_answer_nobody_asked_for_is_an_error(make_workload: Any, clock: Any) -> None:
    class Confused(SignalTarget):
        def poll(self, deadline_ns: int | None) -> list[TokenEvent]:
            return [TokenEvent(99, 0, 1)]

    done = replay(Confused(), make_workload([1]), clock=clock)
    assert isinstance(done.failure, HarnessError)
    assert "not in flight" in str(done.failure)


def test_a_failing_target_loses_no_finished_request(make_target: Any, make_workload: Any, clock: Any) -> None:
    target = make_target({i: [(10, 1)] for i in range(9)})
    poll, before = target.poll, signal.getsignal(signal.SIGINT)

    def failing(deadline_ns: int | None) -> list[TokenEvent]:
        if len(target.submitted) == 4:
            raise RuntimeError("the device is gone")
        return poll(deadline_ns)  # type: ignore[no-any-return]

    target.poll = failing
    done = replay(target, make_workload([1] * 9, concurrency=1), clock=clock)
    assert str(done.failure) == "the device is gone"
    assert done.interrupted
    assert not target.aborted, "its state is unknown"
    assert [trace.finished for trace in done.traces] == [True] * 3 + [False] * 6
    assert done.traces[3].sent_ns is not None
    assert signal.getsignal(signal.SIGINT) is before


def test_no_requests_is_an_error(make_target: Any) -> None:
    with pytest.raises(HarnessError, match="no requests"):
        replay(make_target({}), Workload("empty", ()))


def warmup_ms(done: Replay) -> list[float]:
    return [
        (trace.intended_ns - done.start_ns) / MS for trace in done.warmup if trace.intended_ns is not None
    ]


@pytest.mark.parametrize(
    ("arrivals", "count", "expected"),
    [
        ([0, 10, 20, 30], 2, [-20, -10]),
        ([0, 10, 20, 30], 5, [-50, -40, -30, -20, -10]),
        ([0, 5, 30], 3, [-35, -10, -5]),
        ([100, 105, 130], 3, [-35, -10, -5]),
    ],
)
def test_a_warm_up_comes_in_the_streams_own_gaps_and_one_gap_before_it(
    make_target: Any, make_workload: Any, clock: Any, arrivals: list[int], count: int, expected: list[int]
) -> None:
    """Not at time zero itself: a warm-up request beside the first measured one makes a burst of two."""
    workload = make_workload([1] * len(arrivals), arrivals_ms=arrivals)
    ids = [-1 - i for i in range(count)] + list(range(len(arrivals)))
    target = make_target({i: [(1, 1)] for i in ids})
    done = replay(target, workload, warmup=salted_warmup(workload, count, 100, 0), clock=clock)
    assert warmup_ms(done) == expected
    assert intended_ms(done) == arrivals
    assert [trace.sent_ns for trace in done.warmup] == [trace.intended_ns for trace in done.warmup]


def test_a_slot_is_free_when_its_request_ended_not_when_the_poll_returned(
    make_target: Any, make_workload: Any, clock: Any
) -> None:
    """A poll that comes back 5 ms late delays the sending, which the next request's latency must show."""
    target = make_target({i: [(10, 1)] for i in range(3)})
    poll = target.poll

    def late(deadline_ns: int | None) -> list[TokenEvent]:
        found: list[TokenEvent] = poll(deadline_ns)
        clock.now_ns += 5 * MS
        return found

    target.poll = late
    done = replay(target, make_workload([1] * 3, concurrency=1), clock=clock)
    assert intended_ms(done) == [0, 10, 25]
    assert sent_ms(done) == [0, 15, 30]


def test_a_closed_loops_warm_up_hands_its_slots_over(
    make_target: Any, make_workload: Any, clock: Any
) -> None:
    """Undrained: the measured requests begin while the longer warm-up request still runs."""
    workload = make_workload([1] * 3, concurrency=2)
    script = {-1: [(10, 1)], -2: [(40, 1)]} | {i: [(10, 1)] for i in range(3)}
    done = replay(make_target(script), workload, warmup=salted_warmup(workload, 2, 100, 0), clock=clock)
    assert warmup_ms(done) == [-10, -10]
    assert intended_ms(done) == [0, 10, 20]


def test_a_burst_waits_for_its_warm_up(make_target: Any, make_workload: Any, clock: Any) -> None:
    workload = make_workload([1] * 2)
    target = make_target({-1: [(10, 1)], 0: [(10, 1)], 1: [(10, 1)]})
    done = replay(target, workload, warmup=salted_warmup(workload, 1, 100, 0), clock=clock)
    assert warmup_ms(done) == [-10]
    assert intended_ms(done) == [0, 0]
    assert target.most_in_flight == 2


def test_what_an_interruption_never_sent_keeps_its_time(
    make_target: Any, make_workload: Any, clock: Any
) -> None:
    """The request that the target was taking is due, as is the one behind it; the last one is not."""
    workload = make_workload([1] * 4, arrivals_ms=[0, 30, 40, 1000])
    target = make_target({0: [(500, 1)]}, submit_ms=50)
    submit = target.submit

    def stopped(request: Request) -> int:
        if request.id == 1:
            clock.now_ns += 50 * MS
            raise KeyboardInterrupt
        return submit(request)  # type: ignore[no-any-return]

    target.submit = stopped
    done = replay(target, workload, clock=clock)
    assert done.interrupted
    assert (done.end_ns - done.start_ns) / MS == 100
    assert intended_ms(done) == [0, 30, 40, 1000]
    assert sent_ms(done) == [50]


def test_a_warm_up_shares_no_prompt_with_its_workload(make_workload: Any) -> None:
    workload = make_workload([3, 5, 7, 9], prompt_tokens=6)
    made = salted_warmup(workload, 2, 100, seed=7)
    assert [request.id for request in made] == [-1, -2]
    assert [request.output_tokens for request in made] == [3, 7], "taken evenly across the stream"
    firsts = {request.prompt[0] for request in workload.requests}
    assert firsts.isdisjoint(request.prompt[0] for request in made)
    assert made != salted_warmup(workload, 2, 100, seed=8)


def test_other_threads_keep_the_interpreter_only_briefly_while_requests_are_due(
    make_target: Any, make_workload: Any, clock: Any
) -> None:
    before, seen = sys.getswitchinterval(), []
    target = make_target({0: [(10, 1)]})
    poll = target.poll
    target.poll = lambda deadline_ns: (seen.append(sys.getswitchinterval()), poll(deadline_ns))[1]
    replay(target, make_workload([1]), clock=clock)
    assert seen and max(seen) == pytest.approx(SWITCH_S)
    assert sys.getswitchinterval() == before
