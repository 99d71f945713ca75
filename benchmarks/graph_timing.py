"""Timing device work inside a graph, with cold caches, and writing the rows down."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton


@dataclass(frozen=True)
class Row:
    """One measured figure."""

    name: str
    value: float
    unit: str
    spread: float
    """Half the range between the 10th and the 90th percentile of the replays, in `unit`."""


def graph_time_us(calls: Sequence[Callable[[], Any]], replays: int = 15) -> tuple[float, float]:
    """(median, spread) microseconds of one call when `calls` run back to back in a captured graph.

    Give as many calls on different buffers as exceed the cache several times, so that none finds its
    data there.
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


def conditions() -> dict[str, str]:
    """What the figures were measured on and with."""
    device = torch.cuda.get_device_properties(0)
    return {
        "device": device.name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "method": "median of replays of one captured graph of back-to-back calls on rotating buffers",
    }


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write `rows` and the conditions as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"conditions": conditions(), "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(record, indent=1) + "\n")
