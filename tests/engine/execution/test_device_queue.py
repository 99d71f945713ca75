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
