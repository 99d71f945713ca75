"""Time calls back to back on rotating buffers, eagerly and in a captured graph, in rounds that stand apart.

Launches that follow one another closely agree with one another, whatever the clocks, the host and its
neighbours do a moment later: their spread says nothing of that. So a time is taken in several rounds, with
the other cells' between them, and its interval is over rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from backbench.backends.interface import Device
from backbench.reports.metrics.statistics import interval_ranks

ROUNDS = 8
"""Enough for a 95 % interval of a median, which then spans all of them."""
MAX_LAUNCHES = 20
"""In one round."""


@dataclass(frozen=True)
class Timing:
    """The median of one call over rounds, with its distribution-free 95 % interval."""

    median_s: float
    low_s: float
    high_s: float
    rounds: int


class Stopwatch:
    """Times one launch, which makes several calls, round by round."""

    def __init__(self, launch: Callable[[], Any], calls: int, device: Device, round_s: float) -> None:
        """`round_s`: the measuring time of one round; one launch is made at least."""
        self._launch, self._calls = launch, calls
        self._clock = _seconds_on_gpu if device.torch_device.type == "cuda" else _seconds_on_host
        launch()
        first = self._clock(launch)
        self._launches = int(min(MAX_LAUNCHES, max(1, round_s / max(first, 1e-9))))
        self._warm = first < round_s

    def round(self) -> float:
        """Seconds of one call: the median over a round's launches, the first of which is not timed."""
        if self._warm:
            self._launch()
        return float(np.median([self._clock(self._launch) for _ in range(self._launches)])) / self._calls


def summary(rounds: Sequence[float]) -> Timing:
    """The median over at least six rounds and its interval."""
    times = np.sort(rounds)
    ranks = interval_ranks(len(times), 0.5)
    assert ranks is not None  # six rounds are enough for a median's interval
    return Timing(float(np.median(times)), float(times[ranks[0] - 1]), float(times[ranks[1] - 1]), len(times))


def time_eager(calls: Sequence[Callable[[], Any]], device: Device, budget_s: float) -> Timing:
    """One call's share of a launch of all of them, by themselves, in about `budget_s`."""
    stopwatch = eager_stopwatch(calls, device, budget_s / ROUNDS)
    return summary([stopwatch.round() for _ in range(ROUNDS)])


def eager_stopwatch(calls: Sequence[Callable[[], Any]], device: Device, round_s: float) -> Stopwatch:
    """Launches every call, one after the other, host and all."""

    def launch() -> None:
        for call in calls:
            call()

    return Stopwatch(launch, len(calls), device, round_s)


def graph_stopwatch(calls: Sequence[Callable[[], Any]], device: Device, round_s: float) -> Stopwatch:
    """Replays a graph that holds every call: no host in between."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return Stopwatch(graph.replay, len(calls), device, round_s)


def _seconds_on_gpu(launch: Callable[[], Any]) -> float:
    """From before the first launch to after the last kernel, by the device's clock."""
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    launch()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _seconds_on_host(launch: Callable[[], Any]) -> float:
    start = time.perf_counter_ns()
    launch()
    return (time.perf_counter_ns() - start) / 1e9
