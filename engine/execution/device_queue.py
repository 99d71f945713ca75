"""The queue of work a device does in order, while the host that fills it goes on."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Protocol

import torch

from backbench.engine.execution.gate import CudaGates, Gate, open_gates


class Mark(Protocol):
    """A place in the queue."""

    def synchronize(self) -> None:
        """Wait until the device has done all that was submitted before."""


class Done:
    """The mark of what is done already."""

    def synchronize(self) -> None:
        """Nothing to wait for."""


class Stretch(Protocol):
    """A part of the queue: what is submitted until its end."""

    def end(self) -> None:
        """Nothing more belongs to it."""

    def synchronize(self) -> None:
        """Wait until the device has done it, and all before."""

    def device_ns(self) -> int | None:
        """How long the device took from its beginning to its end; None without events. Once, when done."""


class Untimed:
    """A stretch of a queue that has no events."""

    def __init__(self, queue: DeviceQueue) -> None:
        self._queue = queue
        self._end: Mark = Done()

    def end(self) -> None:
        self._end = self._queue.mark()

    def synchronize(self) -> None:
        self._end.synchronize()

    def device_ns(self) -> int | None:
        return None


class Timed:
    """A stretch between two events, which are taken from a pool and given back: making one costs more than
    recording it."""

    def __init__(self, pool: list[torch.cuda.Event]) -> None:
        self._pool = pool
        self._begin = self._record()
        self._end = self._begin

    def end(self) -> None:
        self._end = self._record()

    def synchronize(self) -> None:
        self._end.synchronize()

    def device_ns(self) -> int | None:
        took_ns = round(self._begin.elapsed_time(self._end) * 1e6)
        self._pool += [self._begin, self._end]
        return took_ns

    def _record(self) -> torch.cuda.Event:
        event = self._pool.pop() if self._pool else torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class DeviceQueue:
    """Everything a step asks of a device goes through here: what the host writes again needs a mark.

    `submit` returns before a GPU has begun; host memory the work reads must stay as it is until a later mark
    was waited for. A CPU is done when `submit` returns. Tests put devices here that are as late as can be.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._asynchronous = device.type != "cpu"
        self._events: list[torch.cuda.Event] = []

    def submit(self, work: Callable[[], None]) -> None:
        """Give the device `work`, which may read and write device tensors and start copies, but not wait."""
        work()

    def mark(self) -> Mark:
        """The place after all that was submitted so far."""
        if not self._asynchronous:
            return Done()
        event = torch.cuda.Event()
        event.record()
        return event

    def stretch(self) -> Stretch:
        """What is submitted from here on, until `end` is called on it."""
        return Timed(self._events) if self._asynchronous else Untimed(self)

    @property
    def no_gates(self) -> str | None:
        """Why `gate` is not to be had; None = it is."""
        return self._gates if isinstance(self._gates, str) else None

    def gate(self) -> Gate:
        """A closed gate after all that was submitted so far: the device goes no further before it is opened.

        While it is closed nothing behind it may be waited for, and there is no other.
        """
        assert not isinstance(self._gates, str), self._gates
        return self._gates.gate()

    @cached_property
    def _gates(self) -> CudaGates | str:
        return open_gates(self._device)
