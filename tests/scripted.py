"""A target whose every time and count is scripted, on a clock that only it moves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from backbench.harness.subjects.target import TokenEvent
from backbench.reports.metrics.compute import sections
from backbench.reports.metrics.requests import Context, Requests
from backbench.reports.metrics.run import RunTables
from backbench.workloads.request import Request, Workload

MS = 1_000_000


@dataclass
class FakeClock:
    """Nanoseconds that pass only when told to."""

    now_ns: int = 5_000_000_000

    def __call__(self) -> int:
        return self.now_ns


@dataclass
class FakeTarget:
    """Answers request `i` with chunks at scripted delays after it took it.

    `script[i]` is a list of (delay in ms after sending, tokens or None); the last chunk finishes it. An
    entry ("error", delay) fails it. `slots` limits how many it serves at once: the rest wait inside.
    """

    clock: FakeClock
    script: dict[int, list[tuple[Any, Any]]]
    slots: int | None = None
    submit_ms: float = 0.0
    """How long taking a request blocks."""
    interrupt_at_ms: float | None = None
    submitted: list[Request] = field(default_factory=list)
    aborted: bool = False
    most_in_flight: int = 0
    _events: list[tuple[int, int, Any, bool]] = field(default_factory=list)
    _queue: list[int] = field(default_factory=list)
    _serving: set[int] = field(default_factory=set)
    _begin_ns: int = 0

    def __post_init__(self) -> None:
        self._begin_ns = self.clock.now_ns

    def submit(self, request: Request) -> int:
        self.clock.now_ns += round(self.submit_ms * MS)
        self.submitted.append(request)
        self._queue.append(request.id)
        self._start()
        self.most_in_flight = max(self.most_in_flight, len(self._serving) + len(self._queue))
        return self.clock.now_ns

    def _start(self) -> None:
        while self._queue and (self.slots is None or len(self._serving) < self.slots):
            request_id = self._queue.pop(0)
            self._serving.add(request_id)
            script = self.script[request_id]
            for place, (delay, count) in enumerate(script):
                last = place == len(script) - 1
                if delay == "error":
                    self._events.append((self.clock.now_ns + round(count * MS), request_id, "error", True))
                else:
                    self._events.append((self.clock.now_ns + round(delay * MS), request_id, count, last))

    def poll(self, deadline_ns: int | None) -> list[TokenEvent]:
        if (
            self.interrupt_at_ms is not None
            and self.clock.now_ns >= self._begin_ns + self.interrupt_at_ms * MS
        ):
            raise KeyboardInterrupt
        times = [event[0] for event in self._events] + ([deadline_ns] if deadline_ns is not None else [])
        assert times, "the replay polls for ever"
        self.clock.now_ns = max(self.clock.now_ns, min(times))
        due = [event for event in self._events if event[0] <= self.clock.now_ns]
        self._events = [event for event in self._events if event[0] > self.clock.now_ns]
        found = []
        for time_ns, request_id, count, last in due:
            if last:
                self._serving.discard(request_id)
            if count == "error":
                found.append(TokenEvent(request_id, time_ns, 0, (), True, "refused"))
            else:
                found.append(TokenEvent(request_id, time_ns, count, (), last))
        self._start()
        return found

    def abort(self) -> None:
        self.aborted = True
        self._events.clear()


def metrics_section(rows: Requests, steps: Any, context: Context, everyone: Requests | None = None) -> Any:
    """The record's `metrics` section of these requests; `everyone` has the warm-up's too."""
    return sections(RunTables(rows, everyone or rows, steps, context), ["metrics"])["metrics"]


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def make_target(clock: FakeClock) -> Callable[..., FakeTarget]:
    def make(script: dict[int, list[tuple[Any, Any]]], **settings: Any) -> FakeTarget:
        return FakeTarget(clock, script, **settings)

    return make


@pytest.fixture
def make_workload() -> Callable[..., Workload]:
    """A workload of requests with these arrivals (ms), output lengths and one prompt length."""

    def make(
        outputs: Sequence[int],
        arrivals_ms: Sequence[float] | None = None,
        concurrency: int | None = None,
        prompt_tokens: int = 4,
    ) -> Workload:
        arrivals = arrivals_ms or [0.0] * len(outputs)
        requests = tuple(
            Request(i, round(at * MS), tuple((7 * i + j) % 100 for j in range(prompt_tokens)), output)
            for i, (output, at) in enumerate(zip(outputs, arrivals, strict=True))
        )
        return Workload("scripted", requests, concurrency)

    return make


@pytest.fixture
def make_context() -> Callable[..., Context]:
    def make(**given: Any) -> Context:
        return Context(
            **({"mode": "open", "end_ns": 10**12, "interrupted": False, "batch_limit": 256} | given)
        )

    return make
