"""What figures show: time series binned for a plot, distributions and points thinned for one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from backbench.reports.metrics.run import RunTables
from backbench.reports.metrics.steps import decode_times_ns, plain_decodes

if TYPE_CHECKING:
    import pandas as pd

    from backbench.reports.metrics.latency import Samples
    from backbench.reports.metrics.requests import Requests

BINS = 160
CHUNKS_PER_BIN = 25
POINTS = 400
"""Most points of one line; an ECDF keeps its ends and equal steps of probability between them."""


@dataclass(frozen=True)
class Series:
    """Bin centres in seconds since the run's start, and one value a bin."""

    time_s: np.ndarray
    values: np.ndarray
    least: np.ndarray | None = None
    """In each bin, as `most`; None where the values are all there are, or are rates of whole bins."""
    most: np.ndarray | None = None


@dataclass(frozen=True)
class Panel:
    """One quantity over time, one series a run (None where a run lacks it)."""

    title: str
    unit: str
    series: tuple[Series | None, ...]


def panels(runs: Sequence[RunTables]) -> list[Panel]:
    """The panels that at least one run has data for."""
    wanted: tuple[tuple[str, str, Callable[[RunTables], Series | None]], ...] = (
        ("Output throughput", "output tok/s", throughput),
        ("Running requests", "requests", lambda run: from_steps(run.measured_steps, "running")),
        ("Waiting requests", "requests", lambda run: from_steps(run.measured_steps, "waiting")),
        ("KV blocks in use", "% of the pool", kv_use),
        ("Power", "W", lambda run: from_telemetry(run, "power_w")),
        ("SM clock", "MHz", lambda run: from_telemetry(run, "sm_clock_mhz")),
        ("Temperature", "°C", lambda run: from_telemetry(run, "temperature_c")),
        ("Host CPU", "% of one core", lambda run: from_telemetry(run, "host_cpu_percent")),
    )
    found = []
    for title, unit, make in wanted:
        series = tuple(make(run) for run in runs)
        if any(each is not None for each in series):
            found.append(Panel(title, unit, series))
    return found


def throughput(run: RunTables) -> Series | None:
    """Output tokens a second, whoever asked for them; None when a chunk's token count or time is unknown."""
    if not run.context.token_times:
        return None
    times, counts = chunks(run.everyone)
    inside = times > 0
    times, counts = times[inside], counts[inside]
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


def chunks(rows: Requests) -> tuple[np.ndarray, np.ndarray]:
    """Time in seconds and token count (NaN = unknown) of every chunk of every request."""
    if not len(rows):
        return np.empty(0), np.empty(0)
    return np.concatenate(rows.chunk_ns) / 1e9, np.concatenate(rows.chunk_tokens)


def kv_use(run: RunTables) -> Series | None:
    """Blocks in use as a share of the pool."""
    steps = run.measured_steps
    if steps.empty or not (steps["kv_blocks_total"] > 0).all():
        return None
    share = 100 * steps["kv_blocks_used"] / steps["kv_blocks_total"]
    return binned(steps["end_ns"].to_numpy(dtype=float) / 1e9, share.to_numpy(dtype=float))


def from_steps(steps: pd.DataFrame, column: str) -> Series | None:
    if steps.empty:
        return None
    return binned(steps["end_ns"].to_numpy(dtype=float) / 1e9, steps[column].to_numpy(dtype=float))


def from_telemetry(run: RunTables, column: str) -> Series | None:
    """The mean over devices that have the column, from the run's start on; None when none has."""
    if run.telemetry is None:
        return None
    values: Any = run.telemetry[column]
    known = run.telemetry[values.notna() & (run.telemetry["time_ns"] >= 0)]
    if known.empty:
        return None
    return binned(known["time_ns"].to_numpy(dtype=float) / 1e9, known[column].to_numpy(dtype=float))


def binned(time_s: np.ndarray, values: np.ndarray) -> Series:
    """Means over at most `BINS` equal bins with the least and most in each; empty bins are left out."""
    if len(time_s) <= BINS:
        return Series(time_s, values)
    width = bin_width(time_s.max())
    place = (time_s / width).astype(int)
    count = np.bincount(place)
    total = np.bincount(place, weights=values)
    least, most = np.full(len(count), np.inf), np.full(len(count), -np.inf)
    np.minimum.at(least, place, values)
    np.maximum.at(most, place, values)
    filled = count > 0
    centres = (np.arange(len(count)) + 0.5) * width
    return Series(centres[filled], total[filled] / count[filled], least[filled], most[filled])


def bin_width(end_s: float, bins: int = BINS) -> float:
    """A round width in seconds (1, 2 or 5 times a power of ten) that makes at most `bins` bins."""
    least = max(end_s / bins, 1e-6)
    power = 10.0 ** np.floor(np.log10(least))
    return float(next(step * power for step in (1, 2, 5, 10) if step * power >= least * (1 - 1e-9)))


def ecdf(samples: Samples) -> tuple[np.ndarray, np.ndarray]:
    """Sorted values (s) and the share of all samples at or below each, thinned to at most `POINTS`."""
    ordered = np.sort(samples.values_s)
    shares = np.arange(1, len(ordered) + 1) / samples.total
    keep = thinned(len(ordered))
    return ordered[keep], shares[keep]


def decode_points(run: RunTables) -> tuple[np.ndarray, np.ndarray]:
    """Context tokens and seconds of every plain decode step, as the fit takes them."""
    chosen = plain_decodes(run.steps)
    context = run.steps["context_tokens"].to_numpy(dtype=float)[chosen]
    return context, decode_times_ns(run.steps)[0] / 1e9


def thinned(count: int) -> np.ndarray:
    """Which of `count` points to draw: all, or `POINTS` spread evenly with both ends."""
    return np.unique(np.linspace(0, count - 1, min(POINTS, count)).round().astype(int))


def thinned_points(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which points to draw: all, or of equal stretches of x the lowest, the highest and the one between."""
    if len(x) <= POINTS:
        return np.arange(len(x))
    stretches = POINTS // 3
    reach = float(np.ptp(x)) or 1.0
    place = np.minimum(((x - x.min()) / reach * stretches).astype(int), stretches - 1)
    order = np.lexsort((y, place))
    first = np.flatnonzero(np.diff(place[order], prepend=-1))
    last = np.append(first[1:], len(order)) - 1
    return np.unique(order[np.concatenate((first, (first + last) // 2, last))])
