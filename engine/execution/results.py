"""What a step leaves behind: on the device, on its way to the host, and there."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from backbench.engine.execution.device_queue import Stretch
from backbench.engine.execution.step_buffers import StepInputs
from backbench.engine.scheduling.scheduler import StepPlan


@dataclass
class StepOutput:
    """What a step leaves on the device: tokens i64[S], and on demand their log-probabilities f32[S], the most
    likely tokens i64[S], and candidates."""

    tokens: Tensor
    logprobs: Tensor | None = None
    top_tokens: Tensor | None = None
    candidates: tuple[Tensor, Tensor] | None = None
    """The most likely tokens i64[S, k] and their log-probabilities f32[S, k]."""

    @property
    def of_tokens(self) -> list[Tensor]:
        """What there is of each token sampled: the token, its log-probability, the most likely one."""
        return [each for each in (self.tokens, self.logprobs, self.top_tokens) if each is not None]


class HostRows:
    """Host memory that results are copied to, pinned where the device is a GPU, and used again once it was
    read: pinning it anew for each step costs more than the copy."""

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._free: dict[tuple[torch.dtype, torch.Size], list[Tensor]] = {}

    def copy(self, result: Tensor, rows: int) -> Tensor:
        """Of a result [S, ...] the first `rows` rows, on their way to the host; the rest means nothing."""
        host = self._take(result, rows)
        host[:rows].copy_(result[:rows], non_blocking=True)
        return host

    def reserve(self, results: Iterable[Tensor], rows: int) -> None:
        """See to it that such copies of all of them find memory."""
        self.give_back([self._take(each, rows) for each in results])

    def give_back(self, hosts: Iterable[Tensor]) -> None:
        """Copies that were read."""
        for host in hosts:
            self._free.setdefault((host.dtype, host.shape), []).append(host)

    def _take(self, result: Tensor, rows: int) -> Tensor:
        # Of few sizes, so that steps of any number of sequences find what others gave back.
        shape = torch.Size((1 << max(rows - 1, 0).bit_length(), *result.shape[1:]))
        free = self._free.get((result.dtype, shape))
        return free.pop() if free else torch.empty(shape, dtype=result.dtype, pin_memory=self._pinned)


@dataclass(frozen=True)
class Launched:
    """What the device was given to do, and where on the host its results will be."""

    results: list[Tensor]
    candidates: list[Tensor]
    """Both are there when `work` is done, and empty where the step samples nothing."""
    rows: HostRows
    """Where the results' memory came from."""
    work: Stretch
    graph: Hashable | None
    """Which captured graph was replayed; None = none."""


class StepInFlight:
    """A launched step whose results may not be there yet."""

    def __init__(self, plan: StepPlan, inputs: StepInputs, launched: Launched, armed_ns: int = 0) -> None:
        """armed_ns: the host's time of launching it before its inputs were known, if it was (`ahead`)."""
        self.plan = plan
        self.inputs = inputs
        self.armed_ns = armed_ns
        self._launched = launched

    @cached_property
    def device_ns(self) -> int | None:
        """How long the device took, once `read` has waited for it; None on a CPU."""
        return self._launched.work.device_ns()

    @property
    def graph(self) -> Hashable | None:
        """Which captured graph was replayed; None = none."""
        return self._launched.graph

    def read(self) -> tuple[list[int], list[float] | None, list[int] | None]:
        """Wait for the step; (tokens, log-probabilities, top tokens) of the slices that sampled, in order.
        Once."""
        launched, live = self._launched, self.inputs.num_live_samples
        launched.work.synchronize()
        if not launched.results:
            return [], None, None
        lists: list[Any] = [result[:live].tolist() for result in launched.results]
        launched.rows.give_back(launched.results)
        return (lists[0], lists[1], lists[2]) if len(lists) == 3 else (lists[0], None, None)

    def candidates(self, sample: int, count: int) -> list[tuple[int, float]]:
        """After `read`: a slice's `count` most likely tokens, and their log-probabilities."""
        ids, logprobs = (each[sample, :count].tolist() for each in self._launched.candidates)
        return list(zip(ids, logprobs, strict=True))
