"""Timing device work inside a captured graph, with cold caches."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch


def graph_time_us(calls: Sequence[Callable[[], Any]], replays: int = 15) -> tuple[float, float]:
    """(median, spread) microseconds of one call when `calls` run back to back in a captured graph.

    Give as many calls on different buffers as exceed the cache several times, so that none finds its
    data there. The spread is half the range between the 10th and the 90th percentile of the replays.
    """
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / len(calls))
    deciles = statistics.quantiles(times, n=10)
    return statistics.median(times), (deciles[-1] - deciles[0]) / 2
