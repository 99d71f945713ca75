"""Time series of a run, binned for a plot: throughput, queue, KV use, and what telemetry sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

    from backbench.reports.page.run_data import RunData

BINS = 160
CHUNKS_PER_BIN = 25


@dataclass(frozen=True)
class Series:
    """Bin centres in seconds since the run's start, and one value a bin (NaN = nothing there)."""

    time_s: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Panel:
    """One quantity over time, one series a run (None where a run lacks it)."""

    title: str
    unit: str
    series: tuple[Series | None, ...]
    maximum: float | None = None
    """Top of the axis where it is known (100 for a share in %)."""


def panels(runs: Sequence[RunData]) -> list[Panel]:
    """The panels that at least one run has data for."""
    wanted: tuple[tuple[str, str, Callable[[RunData], Series | None], float | None], ...] = (
        ("Output throughput", "output tok/s", throughput, None),
        ("Running requests", "requests", lambda run: from_steps(run.steps, "running"), None),
        ("Waiting requests", "requests", lambda run: from_steps(run.steps, "waiting"), None),
        ("KV blocks in use", "% of the pool", kv_use, None),
        ("Power", "W", lambda run: from_telemetry(run.telemetry, "power_w"), None),
        ("SM clock", "MHz", lambda run: from_telemetry(run.telemetry, "sm_clock_mhz"), None),
        ("Temperature", "°C", lambda run: from_telemetry(run.telemetry, "temperature_c"), None),
        ("Host CPU", "% of one core", lambda run: from_telemetry(run.telemetry, "host_cpu_percent"), None),
    )
    found = []
    for title, unit, make, maximum in wanted:
        series = tuple(make(run) for run in runs)
        if any(each is not None for each in series):
            found.append(Panel(title, unit, series, maximum))
    return found


def throughput(run: RunData) -> Series | None:
    """Output tokens a second; None when a chunk's token count is unknown."""
    times, counts = chunks(run.requests)
    if not len(times) or not np.isfinite(counts).all():
        return None
    end = times.max()
    # A bin with few chunks in it shows only the steps' own beat.
    width = bin_width(end, min(BINS, max(12, len(times) // CHUNKS_PER_BIN)))
    edges = np.arange(0.0, end + width, width)
    tokens, _ = np.histogram(times, bins=edges, weights=counts)
    # The last bin is only as long as the run lasts.
    widths = np.minimum(edges[1:], end) - edges[:-1]
    whole = widths > width / 2
    return Series((edges[:-1] + widths / 2)[whole], (tokens / widths)[whole])


def chunks(requests: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Time in seconds and token count (NaN = unknown) of every chunk of every request."""
    if requests.empty:
        return np.empty(0), np.empty(0)
    times = np.concatenate([np.asarray(each, dtype=float) for each in requests["token_ns"]]) / 1e9
    counts = np.concatenate([np.asarray(each, dtype=float) for each in requests["token_counts"]])
    return times, counts


def kv_use(run: RunData) -> Series | None:
    """Blocks in use as a share of the pool."""
    if run.steps.empty or not (run.steps["kv_blocks_total"] > 0).all():
        return None
    share = 100 * run.steps["kv_blocks_used"] / run.steps["kv_blocks_total"]
    return binned(run.steps["end_ns"].to_numpy(dtype=float) / 1e9, share.to_numpy(dtype=float))


def from_steps(steps: pd.DataFrame, column: str) -> Series | None:
    if steps.empty:
        return None
    return binned(steps["end_ns"].to_numpy(dtype=float) / 1e9, steps[column].to_numpy(dtype=float))


def from_telemetry(telemetry: pd.DataFrame, column: str) -> Series | None:
    """The mean over devices that have the column; None when none has."""
    values: Any = telemetry[column]
    known = telemetry[values.notna()]
    if known.empty:
        return None
    return binned(known["time_ns"].to_numpy(dtype=float) / 1e9, known[column].to_numpy(dtype=float))


def binned(time_s: np.ndarray, values: np.ndarray) -> Series:
    """Means over at most `BINS` equal bins; empty bins are left out."""
    if len(time_s) <= BINS:
        return Series(time_s, values)
    width = bin_width(time_s.max())
    place = (time_s / width).astype(int)
    count = np.bincount(place)
    total = np.bincount(place, weights=values)
    filled = count > 0
    centres = (np.arange(len(count)) + 0.5) * width
    return Series(centres[filled], total[filled] / count[filled])


def bin_width(end_s: float, bins: int = BINS) -> float:
    """A round width in seconds (1, 2 or 5 times a power of ten) that makes at most `bins` bins."""
    least = max(end_s / bins, 1e-6)
    power = 10.0 ** np.floor(np.log10(least))
    return float(next(step * power for step in (1, 2, 5, 10) if step * power >= least * (1 - 1e-9)))
