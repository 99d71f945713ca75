"""A subject whose every time and count is scripted, on a clock that only it moves.

It measures the harness itself: what an experiment says of a script is known before it is run. Nothing is
loaded, no time passes, and no torch model is needed.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from backbench.harness.memory import Readings
from backbench.harness.replay import Replay
from backbench.harness.sensors.telemetry import Sensor
from backbench.harness.subjects.subject import Facts, Limits
from backbench.harness.subjects.target import TokenEvent
from backbench.workloads.request import Request, Workload

if TYPE_CHECKING:
    from backbench.engine.request import StepStats

MS = 1_000_000

Chunks = Sequence[tuple[Any, Any]]
"""(delay in ms after the request was taken, tokens or None) of each chunk; the last one finishes the
request. ("error", delay in ms) fails it."""


@dataclass
class ScriptedClock:
    """Nanoseconds that pass only when told to."""

    now_ns: int = 5_000_000_000

    def __call__(self) -> int:
        return self.now_ns


@dataclass
class ScriptedTarget:
    """Answers each request with the chunks its script gives, at their times after it was taken."""

    clock: ScriptedClock
    chunks: Callable[[Request], Chunks]
    slots: int | None = None
    """How many it serves at once; the rest wait inside."""
    submit_ms: float = 0.0
    """How long taking a request blocks."""
    steps: list[StepStats] = field(default_factory=list)
    """It has none."""
    most_in_flight: int = 0
    _events: list[tuple[int, int, Any, bool]] = field(default_factory=list)
    """(time, request, tokens or "error", is it the last)."""
    _queue: list[Request] = field(default_factory=list)
    _serving: set[int] = field(default_factory=set)

    @property
    def running(self) -> int:
        return len(self._serving)

    @property
    def waiting(self) -> int:
        return len(self._queue)

    def submit(self, request: Request) -> int:
        self.clock.now_ns += round(self.submit_ms * MS)
        self._queue.append(request)
        self._start()
        self.most_in_flight = max(self.most_in_flight, len(self._serving) + len(self._queue))
        return self.clock.now_ns

    def poll(self, deadline_ns: int | None) -> list[TokenEvent]:
        """Move the clock to the next event or the deadline, and return what is due then."""
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
        self._events.clear()
        self._queue.clear()
        self._serving.clear()

    def _start(self) -> None:
        while self._queue and (self.slots is None or len(self._serving) < self.slots):
            request = self._queue.pop(0)
            self._serving.add(request.id)
            script = self.chunks(request)
            for place, (delay, count) in enumerate(script):
                last = place == len(script) - 1
                after_ms, what = (count, "error") if delay == "error" else (delay, count)
                self._events.append((self.clock.now_ns + round(after_ms * MS), request.id, what, last))


@dataclass
class ScriptedSubject:
    """Serves every request alike: its first token after `first_ms`, each further one after `each_ms`."""

    first_ms: float = 50.0
    each_ms: float = 10.0
    slots: int | None = None
    vocab_size: int = 1000
    max_len: int = 4096
    clock: ScriptedClock = field(default_factory=ScriptedClock)

    def chunks(self, request: Request) -> Chunks:
        """One token a chunk."""
        return [(self.first_ms + i * self.each_ms, 1) for i in range(request.output_tokens)]

    def limits(self) -> Limits:
        return Limits(self.vocab_size, self.max_len, num_requests=48, concurrency=16)

    def prepare(self, workload: Workload, stage: Callable[[str], None]) -> None:
        """Nothing is loaded."""

    @property
    def loaded(self) -> bool:
        return True

    def facts(self) -> Facts:
        return Facts(
            model={"name": "scripted", "dtype": "none", "vocab_size": self.vocab_size},
            backend={"asked": "scripted", "used": {}, "reason": "a script computes nothing"},
            system={"device": {"vendor": "cpu", "name": "a script", "arch": platform.machine()}},
            batch_limit=self.slots or 2**31 - 1,
        )

    def settings(self) -> dict[str, Any]:
        return {"first_ms": self.first_ms, "each_ms": self.each_ms, "slots": self.slots}

    def sensors(self) -> tuple[list[Sensor], list[str]]:
        return [], ["a script draws no power"]

    def start(self) -> ScriptedTarget:
        return ScriptedTarget(self.clock, self.chunks, self.slots)

    def finish(self, done: Replay, stage: Callable[[str], None]) -> dict[str, Any]:
        """Nothing is open."""
        return {}

    def memory(self, reachable: bool = True) -> Readings:
        return Readings()

    def check(self, workload: Workload) -> dict[str, Any]:
        return {"passed": None, "reason": "a script has no results to check"}

    def accuracy(self) -> dict[str, Any]:
        return {"reason": "a script has no weights"}
