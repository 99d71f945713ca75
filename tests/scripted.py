"""Fixtures around the scripted target: what a replay is driven with in tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from backbench.harness.subjects.scripted import MS, ScriptedClock, ScriptedTarget
from backbench.harness.subjects.target import TokenEvent
from backbench.reports.metrics.compute import sections
from backbench.reports.metrics.requests import Context, Requests
from backbench.reports.metrics.run import RunTables
from backbench.workloads.request import Request, Workload

FakeClock = ScriptedClock


class FakeTarget(ScriptedTarget):
    """`script[i]` holds the chunks of request `i`; remembers what it was asked, and can be interrupted."""

    def __init__(
        self,
        clock: ScriptedClock,
        script: dict[int, list[tuple[Any, Any]]],
        slots: int | None = None,
        submit_ms: float = 0.0,
        interrupt_at_ms: float | None = None,
    ) -> None:
        super().__init__(clock, lambda request: script[request.id], slots, submit_ms)
        self.script = script
        self.interrupt_at_ms = interrupt_at_ms
        self.submitted: list[Request] = []
        self.aborted = False
        self._begin_ns = clock.now_ns

    def submit(self, request: Request) -> int:
        self.submitted.append(request)
        return super().submit(request)

    def poll(self, deadline_ns: int | None) -> list[TokenEvent]:
        if (
            self.interrupt_at_ms is not None
            and self.clock.now_ns >= self._begin_ns + self.interrupt_at_ms * MS
        ):
            raise KeyboardInterrupt
        return super().poll(deadline_ns)

    def abort(self) -> None:
        self.aborted = True
        super().abort()


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
