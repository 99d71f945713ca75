"""Drive a target through a workload and stamp what happens, on one monotonic clock."""

from __future__ import annotations

import heapq
import itertools
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Literal

from backbench.errors import HarnessError
from backbench.harness.sessions import Sessions
from backbench.harness.sessions import Trace as Trace
from backbench.harness.subjects.target import Target
from backbench.harness.switching import switching_often
from backbench.workloads.request import Request, Workload

Mode = Literal["open", "closed", "all_at_once"]
Clock = Callable[[], int]


@dataclass(frozen=True)
class Progress:
    """How far a replay has come; counts are of measured requests only."""

    done: int
    total: int
    output_tokens: int
    in_flight: int
    elapsed_s: float
    """Since the measured part began; negative while the warm-up runs."""


@dataclass(frozen=True)
class Replay:
    """A replay, finished or cut short."""

    mode: Mode
    traces: tuple[Trace, ...]
    warmup: tuple[Trace, ...]
    start_ns: int
    """Time zero of the run: the workload's, or when the first measured request was intended."""
    end_ns: int
    start_unix_ns: int
    """Wall clock at `start_ns`: the one anchor to civil time; no interval is taken from it."""
    interrupted: bool
    """It ended before its workload did."""
    failure: Exception | None = None
    """What the target raised, where that ended it."""


def mode_of(workload: Workload) -> Mode:
    """How the requests are offered: by slots, by time, or all together."""
    if workload.concurrency is not None:
        return "closed"
    return "open" if any(request.arrival_ns for request in workload.requests) else "all_at_once"


class _Interrupt:
    """Set by the first Ctrl-C, so that a replay ends between two polls and never inside one."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


@contextmanager
def _interruptible() -> Iterator[_Interrupt]:
    interrupt = _Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    previous = signal.signal(signal.SIGINT, interrupt)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, previous)


class _Run:
    """One replay in progress. Warm-up and measured requests share the target and the bookkeeping."""

    def __init__(
        self,
        target: Target,
        clock: Clock,
        sessions: Sessions,
        on_progress: Callable[[Progress], None] | None,
        on_trace: Callable[[Trace], None] | None,
    ) -> None:
        self.target = target
        self.clock = clock
        self.sessions = sessions
        self.on_progress = on_progress
        self.on_trace = on_trace
        self.flying: dict[int, Trace] = {}
        self.start_ns: int | None = None
        self.origin_ns = 0
        """Time zero of the workload's own arrival times."""
        self.done = 0
        self.total = 0
        self.output_tokens = 0
        self._due: list[tuple[int, int, Trace]] = []
        """A heap of what has a time; of equal times, first come, first served."""
        self._order = itertools.count()
        self._firsts: deque[Trace] = deque()
        """Those that begin a session when a slot is free."""
        self._free: deque[int] | None = None
        """When each free slot became so; None = there are none to wait for."""

    def schedule(self, due_ns: int, trace: Trace) -> None:
        """Send a request at a time, as soon as `go_on` sees it."""
        heapq.heappush(self._due, (due_ns, next(self._order), trace))

    def fill(self, firsts: Iterable[Trace], slots: int) -> None:
        """Keep `slots` sessions going; the next one's first request is intended when a slot became free."""
        self._firsts.extend(firsts)
        self._free = deque([self.clock()] * slots)

    def go_on(self, interrupt: _Interrupt) -> None:
        """Send each request at its time, however far behind the target is, until all have ended."""
        while (self._due or self._firsts or self.flying) and not interrupt.asked:
            while self._firsts and self._free:
                self._send(self._firsts.popleft(), self._free.popleft())
            while self._due and self._due[0][0] <= self.clock():
                due_ns, _, trace = heapq.heappop(self._due)
                self._send(trace, due_ns)
            self._poll(self._due[0][0] if self._due else None)

    def _send(self, trace: Trace, intended_ns: int) -> None:
        trace.intended_ns = intended_ns
        if trace.request.id >= 0 and self.start_ns is None:
            self.start_ns = intended_ns
        self.flying[trace.request.id] = trace
        trace.sent_ns = self.target.submit(trace.request)
        if self.on_trace is not None:
            self.on_trace(trace)

    def _poll(self, deadline_ns: int | None) -> None:
        """Advance the target."""
        for event in self.target.poll(deadline_ns):
            trace = self.flying.get(event.request_id)
            if trace is None:
                raise HarnessError(
                    f"The target answered for request {event.request_id}, which is not in flight."
                )
            trace.observe(event)
            self.output_tokens += (event.count or 0) if event.request_id >= 0 else 0
            if trace.end_ns is not None:
                del self.flying[event.request_id]
                self._ended(trace, trace.end_ns)
        if self.on_progress is not None:
            elapsed_s = 0.0 if self.start_ns is None else (self.clock() - self.start_ns) / 1e9
            self.on_progress(Progress(self.done, self.total, self.output_tokens, len(self.flying), elapsed_s))

    def _ended(self, trace: Trace, end_ns: int) -> None:
        freed = self.sessions.end(trace)
        for each in (trace, *freed.given_up):
            self.done += each.request.id >= 0
            if self.on_trace is not None:
                self.on_trace(each)
        for turn in freed.turns:
            arrival_ns = self.origin_ns + turn.request.arrival_ns if turn.request.arrival_ns else end_ns
            self.schedule(max(end_ns + turn.request.think_ns, arrival_ns), turn)
        if freed.over and self._free is not None:
            self._free.append(end_ns)


def _warmup_times(workload: Workload, count: int) -> list[int]:
    """Arrivals of `count` warm-up requests before time zero: the stream's own gaps, mirrored."""
    arrivals = [request.arrival_ns for request in workload.requests if request.follows is None]
    span = arrivals[-1] - arrivals[0] + max(1, (arrivals[-1] - arrivals[0]) // max(1, len(arrivals) - 1))
    offsets = [arrivals[i % len(arrivals)] - arrivals[0] + (i // len(arrivals)) * span for i in range(count)]
    gap = offsets[1] if count > 1 else span
    return sorted(-(offset + gap) for offset in offsets)


def replay(
    target: Target,
    workload: Workload,
    *,
    warmup: Sequence[Request] = (),
    clock: Clock = time.perf_counter_ns,
    on_progress: Callable[[Progress], None] | None = None,
    on_trace: Callable[[Trace], None] | None = None,
) -> Replay:
    """Offer every request at its intended time and stamp every token.

    Open loop: a request is intended at its arrival time, whatever the target's speed. Closed loop: it is
    intended when its slot became free. A later turn of a session is intended its think time after the answer
    before it ended, or at its arrival time where that is later; its prompt holds that answer. A closed loop's
    slot is a session's as long as that lasts, think times included: it stands for one user. Where a turn
    fails its session ends, and the turns after it have failed, too, without being sent.

    Warm-up requests (ids below 0) run first and are handed over without draining: their slots, or their
    place in the arrival stream, pass to the measured requests. All at once, the burst itself is the
    workload, so there the warm-up is drained before it.

    Ctrl-C ends the replay between two polls, a second one inside the target: what is in flight is dropped,
    and what was measured is returned with `interrupted` set. An error of the target ends it too; it is
    returned as `failure` beside what was measured until then.

    `on_trace` is called with each request once it was sent and once it ended; it must return at once.
    """
    if not workload.requests:
        raise HarnessError("The workload holds no requests.")
    mode = mode_of(workload)
    before = [Trace(request) for request in warmup]
    traces = [Trace(request) for request in workload.requests]
    run = _Run(target, clock, Sessions([*before, *traces]), on_progress, on_trace)
    run.total = len(workload.requests)
    interrupted = False
    failure: Exception | None = None
    begin_ns = clock()
    with switching_often(), _interruptible() as interrupt:
        try:
            _offer(run, workload, mode, before, traces, interrupt)
        except KeyboardInterrupt:
            # Raised inside the target (a second Ctrl-C): its state is unknown, so it is left alone.
            interrupted = True
        except Exception as error:  # kept and handed on: finished requests must outlive it
            interrupted, failure = True, error
        end_ns = clock()
        if interrupt.asked and not interrupted:
            interrupted = True
            target.abort()
    start_ns = begin_ns if run.start_ns is None else run.start_ns
    anchor = time.time_ns() - (clock() - start_ns)
    return Replay(mode, tuple(traces), tuple(before), start_ns, end_ns, anchor, interrupted, failure)


def _offer(
    run: _Run, workload: Workload, mode: Mode, before: list[Trace], traces: list[Trace], interrupt: _Interrupt
) -> None:
    """What follows another request is left to its session."""
    firsts = [trace for trace in traces if trace.request.follows is None]
    if mode == "closed":
        assert workload.concurrency is not None
        run.fill([*before, *firsts], workload.concurrency)
    elif mode == "all_at_once":
        for burst in (before, firsts):
            begin_ns = run.clock()
            for trace in burst:
                run.schedule(begin_ns, trace)
            run.go_on(interrupt)
    else:
        early = _warmup_times(workload, len(before)) if before else []
        run.start_ns = run.origin_ns = run.clock() - (early[0] if early else 0)
        for at, trace in zip(early, before, strict=True):
            run.schedule(run.origin_ns + at, trace)
        for trace in firsts:
            trace.intended_ns = run.origin_ns + trace.request.arrival_ns
            run.schedule(trace.intended_ns, trace)
    run.go_on(interrupt)


def salted_warmup(workload: Workload, count: int, vocab_size: int, seed: int) -> tuple[Request, ...]:
    """`count` requests with the workload's length mix and none of its prompts.

    Every token id is shifted by one seeded amount modulo the vocabulary: each prompt differs from its
    twin in its first token (so no cached prefix can be shared), and prefixes shared among the warm-up
    requests stay shared. Ids are -1, -2, ... Requests are taken evenly across the stream.
    """
    if count == 0:
        return ()
    shift = 1 + (seed * 2654435761 + 12345) % (vocab_size - 1)
    n = len(workload.requests)
    twins = [workload.requests[(i * n) // count % n] for i in range(count)]
    return tuple(
        Request(
            id=-1 - i,
            arrival_ns=0,
            prompt=tuple((token + shift) % vocab_size for token in twin.prompt),
            output_tokens=twin.output_tokens,
            temperature=twin.temperature,
            seed=twin.seed,
        )
        for i, twin in enumerate(twins)
    )
