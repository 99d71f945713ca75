"""A device that is as late as a GPU may be, on a CPU: races of the host with it become plain failures.

A CPU has computed a step when it is launched, so nothing the host does too early can show. Here a device
begins only when it is waited for: it then finds host memory as it is by that time. And of two values for one
element of an `index_put_` the first stays, where torch on a CPU happens to keep the last.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_fixtures import open_small
from torch import Tensor

from backbench.engine.engine import Engine
from backbench.engine.execution.device_queue import DeviceQueue
from backbench.engine.execution.runner import Runner
from backbench.engine.execution.step_buffers import StepBuffers
from backbench.engine.execution.step_shape import graph_shapes


class LateMark:
    def __init__(self, queue: LateQueue, place: int) -> None:
        self.queue = queue
        self.place = place

    def synchronize(self) -> None:
        self.queue.run_until(self.place)


class LateQueue(DeviceQueue):
    """Does nothing before a mark is waited for, and then no more than it must."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self._pending: deque[Callable[[], None]] = deque()
        self._submitted = 0

    @property
    def num_pending(self) -> int:
        return len(self._pending)

    def submit(self, work: Callable[[], None]) -> None:
        self._pending.append(work)
        self._submitted += 1

    def mark(self) -> LateMark:
        return LateMark(self, self._submitted)

    @torch.inference_mode()
    def run_until(self, place: int) -> None:
        while self._submitted - len(self._pending) < place:
            self._pending.popleft()()


def keep_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two values for one element, `Tensor.index_put_` keeps the first, as a device may."""
    put = Tensor.index_put_

    def first(self: Tensor, indices: tuple[Tensor, ...], values: Tensor, accumulate: bool = False) -> Tensor:
        return put(self, tuple(index.flip(0) for index in indices), values.flip(0), accumulate)

    monkeypatch.setattr(Tensor, "index_put_", first)


def make_late(engine: Engine, *, padded: bool = False) -> Engine:
    """Two steps in flight on a late device; `padded` lays steps out as captured graphs have them."""
    limits, queue = engine.limits, LateQueue()
    runner = Runner(engine.decoder, engine.selection.operations, limits, graphs=False, queue=queue)
    if padded:
        runner._shapes = graph_shapes(limits.max_seqs, limits.max_step_tokens, True, limits.draft_tokens)
        largest = max(shape.num_tokens for shape in runner._shapes)
        tables, cpu = runner._eager.tables, torch.device("cpu")
        runner._captured = StepBuffers(limits, tables, cpu, queue, largest)
    engine.runner = runner
    engine.max_steps_in_flight = 2
    return engine


def open_late(*, padded: bool = False, **settings: Any) -> Engine:
    """`open_small` on a late device."""
    return make_late(open_small(**settings), padded=padded)
