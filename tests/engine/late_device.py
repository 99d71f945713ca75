"""A device that is as late as a GPU may be, on a CPU: races of the host with it become plain failures.

A CPU has computed a step when it is launched, so nothing the host does too early can show. Here a device
begins only when it is waited for: it then finds host memory as it is by that time. And of two values for one
element of an `index_put_` the first stays, where torch on a CPU happens to keep the last. To wait for what
lies behind a closed gate fails: a GPU and its host would wait for each other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from typing import Any

import pytest
import torch
from engine_fixtures import open_small
from torch import Tensor

from backbench.engine.engine import Engine
from backbench.engine.execution.device_queue import DeviceQueue
from backbench.engine.execution.results import StepOutput
from backbench.engine.execution.runner import Runner
from backbench.engine.execution.step_buffers import StepBuffers, StepInputs
from backbench.engine.execution.step_shape import graph_shapes


class LateMark:
    def __init__(self, queue: LateQueue, place: int) -> None:
        self.queue = queue
        self.place = place

    def synchronize(self) -> None:
        self.queue.run_until(self.place)


class LateGate:
    def __init__(self) -> None:
        self.closed = True

    def open(self) -> None:
        self.closed = False

    def let_pass(self) -> None:
        assert not self.closed, "the host waits for a device that waits for the host"


class LateQueue(DeviceQueue):
    """Does nothing before a mark is waited for, and then no more than it must."""

    @property
    def no_gates(self) -> None:
        """It has them."""

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

    def gate(self) -> LateGate:
        gate = LateGate()
        self.submit(gate.let_pass)
        return gate

    @torch.inference_mode()
    def run_until(self, place: int) -> None:
        while self._submitted - len(self._pending) < place:
            self._pending[0]()
            self._pending.popleft()


class LateGraph:
    """What a captured graph is to a runner: the same launches once more, for what its key bakes in, with
    results in the same place each time."""

    def __init__(self, runner: Runner, key: Any) -> None:
        self.runner = runner
        self.inputs = inputs = StepInputs(key[0])
        inputs.all_greedy, inputs.any_filter, inputs.any_forced, inputs.logprobs, inputs.candidates = key[1]
        inputs.max_len = runner.limits.max_len
        ids, floats = (torch.zeros(inputs.num_samples, dtype=each) for each in (torch.int64, torch.float32))
        self.output = StepOutput(ids)
        if inputs.logprobs:
            self.output.logprobs, self.output.top_tokens = floats, ids.clone()

    def replay(self) -> None:
        runner, inputs = self.runner, self.inputs
        output = runner._compute(runner._captured, inputs, runner._batch(inputs))
        assert output is not None
        for kept, result in zip(self.output.of_tokens, output.of_tokens, strict=True):
            kept.copy_(result)


class LateGraphs(dict[Hashable, Any]):
    """A graph of every kind that a runner captures, made when it is asked for."""

    def __init__(self, runner: Runner) -> None:
        super().__init__()
        self.runner = runner

    def get(self, key: Any, default: Any = None) -> Any:
        *_, forced, _, candidates = key[1]
        return default if forced or candidates else self[key]

    def __missing__(self, key: Any) -> Any:
        graph = LateGraph(self.runner, key)
        self[key] = graph, graph.output
        return self[key]


def keep_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two values for one element, `Tensor.index_put_` keeps the first, as a device may."""
    put = Tensor.index_put_

    def first(self: Tensor, indices: tuple[Tensor, ...], values: Tensor, accumulate: bool = False) -> Tensor:
        return put(self, tuple(index.flip(0) for index in indices), values.flip(0), accumulate)

    monkeypatch.setattr(Tensor, "index_put_", first)


def make_late(engine: Engine, *, padded: bool = False, graphs: bool = False) -> Engine:
    """Two steps in flight on a late device; `padded` lays steps out as captured graphs have them, `graphs`
    replays such."""
    limits, queue = engine.limits, LateQueue()
    runner = Runner(engine.decoder, engine.selection.operations, limits, graphs=False, queue=queue)
    if padded or graphs:
        runner._shapes = graph_shapes(limits.max_seqs, limits.max_step_tokens, True, limits.draft_tokens)
        largest = max(shape.num_tokens for shape in runner._shapes)
        tables, cpu = runner._eager.tables, torch.device("cpu")
        runner._captured = StepBuffers(limits, tables, cpu, queue, largest)
    if graphs:
        runner._graphs = LateGraphs(runner)
    engine.runner = runner
    engine.max_steps_in_flight = 2
    return engine


def open_late(*, padded: bool = False, **settings: Any) -> Engine:
    """`open_small` on a late device."""
    return make_late(open_small(**settings), padded=padded)
