"""Drive a target through a workload and stamp what happens, on one monotonic clock."""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Literal

from backbench.errors import HarnessError
from backbench.harness.subjects.target import Target, TokenEvent
from backbench.workloads.request import Request, Workload

Mode = Literal["open", "closed", "all_at_once"]
Clock = Callable[[], int]


@dataclass
class Trace:
    """What happened to one request. Times are raw readings of the replay's clock, in ns."""

    request: Request
    intended_ns: int | None = None
    sent_ns: int | None = None
    chunk_ns: list[int] = field(default_factory=list)
    chunk_tokens: list[int | None] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    end_ns: int | None = None
    """When the target reported it finished or failed."""
    error: str | None = None
    usage_tokens: int | None = None
    """All output tokens by the target's own count; None = it gave none."""

    @property
    def finished(self) -> bool:
        return self.end_ns is not None and self.error is None

    def observe(self, event: TokenEvent) -> None:
        # A chunk without tokens (a role, a usage message) is no token: it must not set the first one.
        if event.error is None and event.count != 0:
            self.chunk_ns.append(event.time_ns)
            self.chunk_tokens.append(event.count)
            self.token_ids.extend(event.token_ids)
        if event.sent_ns is not None:
            self.sent_ns = event.sent_ns
        if event.counts is not None:
            self.chunk_tokens = list(event.counts)
        if event.usage_tokens is not None:
            self.usage_tokens = event.usage_tokens
        if event.finished or event.error is not None:
            self.end_ns = event.time_ns
            self.error = event.error


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
        on_progress: Callable[[Progress], None] | None,
        on_trace: Callable[[Trace], None] | None,
    ) -> None:
        self.target = target
        self.clock = clock
        self.on_progress = on_progress
        self.on_trace = on_trace
        self.flying: dict[int, Trace] = {}
        self.start_ns: int | None = None
        self.done = 0
        self.total = 0
        self.output_tokens = 0

    def send(self, trace: Trace, intended_ns: int) -> None:
        trace.intended_ns = intended_ns
        if trace.request.id >= 0 and self.start_ns is None:
            self.start_ns = intended_ns
        self.flying[trace.request.id] = trace
        trace.sent_ns = self.target.submit(trace.request)
        if self.on_trace is not None:
            self.on_trace(trace)

    def poll(self, deadline_ns: int | None) -> list[int]:
        """Advance the target; returns when each slot became free."""
        freed: list[int] = []
        for event in self.target.poll(deadline_ns):
            trace = self.flying.get(event.request_id)
            if trace is None:
                raise HarnessError(
                    f"The target answered for request {event.request_id}, which is not in flight."
                )
            trace.observe(event)
            measured = event.request_id >= 0
            self.output_tokens += (event.count or 0) if measured else 0
            if trace.end_ns is not None:
                del self.flying[event.request_id]
                freed.append(event.time_ns)
                self.done += measured
                if self.on_trace is not None:
                    self.on_trace(trace)
        if self.on_progress is not None:
            elapsed_s = 0.0 if self.start_ns is None else (self.clock() - self.start_ns) / 1e9
            self.on_progress(Progress(self.done, self.total, self.output_tokens, len(self.flying), elapsed_s))
        return freed

    def scheduled(self, due: Iterable[tuple[int, Trace]], interrupt: _Interrupt) -> None:
        """Send each request at its time, however far behind the target is; then wait for the rest."""
        waiting = deque(due)
        while (waiting or self.flying) and not interrupt.asked:
            while waiting and waiting[0][0] <= self.clock():
                intended_ns, trace = waiting.popleft()
                self.send(trace, intended_ns)
            self.poll(waiting[0][0] if waiting else None)

    def slots(self, traces: Sequence[Trace], concurrency: int, interrupt: _Interrupt) -> None:
        """Keep `concurrency` requests in flight; the next is intended when a slot became free."""
        free = deque([self.clock()] * concurrency)
        waiting = deque(traces)
        while (waiting or self.flying) and not interrupt.asked:
            while waiting and free:
                self.send(waiting.popleft(), free.popleft())
            free.extend(self.poll(None))


def _warmup_times(workload: Workload, count: int) -> list[int]:
    """Arrivals of `count` warm-up requests before time zero: the stream's own gaps, mirrored."""
    arrivals = [request.arrival_ns for request in workload.requests]
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
    intended when its slot became free. Warm-up requests (ids below 0) run first and are handed over
    without draining: their slots, or their place in the arrival stream, pass to the measured requests.
    All at once, the burst itself is the workload, so there the warm-up is drained before it.

    Ctrl-C ends the replay between two polls, a second one inside the target: what is in flight is dropped,
    and what was measured is returned with `interrupted` set. An error of the target ends it too; it is
    returned as `failure` beside what was measured until then.

    `on_trace` is called with each request once it was sent and once it ended; it must return at once.
    """
    if not workload.requests:
        raise HarnessError("The workload holds no requests.")
    mode = mode_of(workload)
    run = _Run(target, clock, on_progress, on_trace)
    run.total = len(workload.requests)
    before = [Trace(request) for request in warmup]
    traces = [Trace(request) for request in workload.requests]
    interrupted = False
    failure: Exception | None = None
    begin_ns = clock()
    with _interruptible() as interrupt:
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
    if mode == "closed":
        assert workload.concurrency is not None
        run.slots([*before, *traces], workload.concurrency, interrupt)
    elif mode == "all_at_once":
        begin_ns = run.clock()
        run.scheduled([(begin_ns, trace) for trace in before], interrupt)
        start_ns = run.clock()
        run.scheduled([(start_ns, trace) for trace in traces], interrupt)
    else:
        early = _warmup_times(workload, len(before)) if before else []
        start_ns = run.clock() - (early[0] if early else 0)
        for trace in traces:
            trace.intended_ns = start_ns + trace.request.arrival_ns
        run.start_ns = start_ns
        schedule = [(start_ns + at, trace) for at, trace in zip(early, before, strict=True)]
        schedule += [(trace.intended_ns or 0, trace) for trace in traces]
        run.scheduled(schedule, interrupt)


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
