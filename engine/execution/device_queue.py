"""The queue of work a device does in order, while the host that fills it goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch


class Mark(Protocol):
    """A place in the queue."""

    def synchronize(self) -> None:
        """Wait until the device has done all that was submitted before."""


class Done:
    """The mark of what is done already."""

    def synchronize(self) -> None:
        """Nothing to wait for."""


class DeviceQueue:
    """Everything a step asks of a device goes through here: what the host writes again needs a mark.

    `submit` returns before a GPU has begun; host memory the work reads must stay as it is until a later mark
    was waited for. A CPU is done when `submit` returns. Tests put devices here that are as late as can be.
    """

    def __init__(self, device: torch.device) -> None:
        self._asynchronous = device.type != "cpu"

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
