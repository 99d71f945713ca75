"""Work is done in order, and a mark is passed when all before it is done."""

from __future__ import annotations

import pytest
import torch
from late_device import LateQueue

from backbench.engine.execution.device_queue import DeviceQueue, Done


def test_a_cpu_has_done_what_was_submitted() -> None:
    queue = DeviceQueue(torch.device("cpu"))
    seen: list[int] = []
    queue.submit(lambda: seen.append(1))
    assert seen == [1]
    mark = queue.mark()
    assert isinstance(mark, Done)
    mark.synchronize()


def test_a_gpus_mark_is_an_event_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        recorded = 0

        def record(self) -> None:
            self.recorded += 1

    monkeypatch.setattr(torch.cuda, "Event", Event)
    queue = DeviceQueue(torch.device("cuda", 0))
    marks = [queue.mark(), queue.mark()]
    assert marks[0] is not marks[1]
    assert [mark.recorded for mark in marks] == [1, 1]  # type: ignore[attr-defined]


def test_a_late_device_does_no_more_than_it_must() -> None:
    queue = LateQueue()
    seen: list[str] = []
    queue.submit(lambda: seen.append("a"))
    first = queue.mark()
    queue.submit(lambda: seen.append("b"))
    second = queue.mark()
    queue.submit(lambda: seen.append("c"))
    assert seen == []
    first.synchronize()
    assert seen == ["a"]
    second.synchronize()
    first.synchronize()
    assert seen == ["a", "b"]


class TimedEvent:
    """An event of a device on which a microsecond passes with each."""

    made = 0
    now_ms = 0.0

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing
        TimedEvent.made += 1
        self.waited = 0

    def record(self) -> None:
        TimedEvent.now_ms += 1e-3
        self.at_ms = TimedEvent.now_ms

    def synchronize(self) -> None:
        self.waited += 1

    def elapsed_time(self, end: TimedEvent) -> float:
        return end.at_ms - self.at_ms


def test_a_stretch_is_timed_by_events_that_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", TimedEvent)
    queue = DeviceQueue(torch.device("cuda", 0))
    for _ in range(5):  # two in flight, as the engine has them
        first = queue.stretch()
        first.end()
        second = queue.stretch()
        second.end()
        for each in (first, second):
            each.synchronize()
            assert each.device_ns() == 1000
    assert TimedEvent.made == 4


def test_a_cpu_times_no_stretch() -> None:
    stretch = DeviceQueue(torch.device("cpu")).stretch()
    stretch.end()
    stretch.synchronize()
    assert stretch.device_ns() is None


def test_a_stretch_of_a_late_device_ends_where_it_was_ended() -> None:
    queue = LateQueue()
    seen: list[str] = []
    stretch = queue.stretch()
    queue.submit(lambda: seen.append("a"))
    stretch.end()
    queue.submit(lambda: seen.append("b"))
    stretch.synchronize()
    assert seen == ["a"]
