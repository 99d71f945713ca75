"""Time calls back to back on rotating buffers, eagerly and in a captured graph."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from backbench.backends.interface import Device
from backbench.reports.metrics.statistics import interval_ranks

MIN_ROUNDS, MAX_ROUNDS = 7, 60


@dataclass(frozen=True)
class Timing:
    """The median of one call over rounds, with its distribution-free 95 % interval."""

    median_s: float
    low_s: float
    high_s: float
    rounds: int


def time_eager(calls: Sequence[Callable[[], Any]], device: Device, budget_s: float) -> Timing:
    """One call's share of a round of all of them, launches and all."""

    def round_of_calls() -> None:
        for call in calls:
            call()

    return _rounds(round_of_calls, len(calls), device, budget_s)


def time_graph(calls: Sequence[Callable[[], Any]], device: Device, budget_s: float) -> Timing:
    """One call's share of a replay of a graph that holds all of them: no host in between."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return _rounds(graph.replay, len(calls), device, budget_s)


def _rounds(launch: Callable[[], Any], calls: int, device: Device, budget_s: float) -> Timing:
    clock = _seconds_on_gpu if device.torch_device.type == "cuda" else _seconds_on_host
    launch()
    first = clock(launch)
    rounds = int(min(MAX_ROUNDS, max(MIN_ROUNDS, budget_s / max(first, 1e-9))))
    times = np.sort([clock(launch) / calls for _ in range(rounds)])
    ranks = interval_ranks(rounds, 0.5)
    assert ranks is not None  # seven rounds are enough for a median's interval
    return Timing(float(np.median(times)), float(times[ranks[0] - 1]), float(times[ranks[1] - 1]), rounds)


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
