"""Every number a reader compares: where the record keeps it, its unit, and which way is better."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from backbench.reports.record import RunRecord

NOT_MEASURED = "not measured"
DASH = "—"


@dataclass(frozen=True)
class Quantity:
    """One number of the record."""

    path: tuple[str, ...]
    """Section and keys, e.g. ("metrics", "ttft_s", "p50")."""
    label: str
    unit: str
    """What `format_value` knows: "s", "bytes", "tok/s", "tok/s/user", "req/s", "J/token", "ratio", ..."""
    higher_is_better: bool | None
    """None where neither direction is better."""
    group: str
    headline: bool = False
    """Shown in the scorecard of several runs."""


@dataclass(frozen=True)
class Reading:
    """A quantity's value in one record, with its interval where there is one."""

    value: float | None
    low: float | None = None
    high: float | None = None
    reason: str | None = None
    """Why there is no value."""


LATENCIES: tuple[tuple[str, str, str], ...] = (
    ("ttft_s", "Time to first token", "TTFT"),
    ("ttft_sent_s", "Time to first token, from sending", "TTFT from sending"),
    ("tpot_s", "Time per output token", "TPOT"),
    ("itl_s", "Inter-token latency", "ITL"),
    ("icl_s", "Inter-chunk latency", "ICL"),
    ("e2e_s", "End-to-end latency", "E2E"),
    ("normalized_latency_s", "End-to-end latency per output token", "Normalized latency"),
)
"""Key, full name, short name."""

STATISTICS = ("mean", "p50", "p90", "p95", "p99")


def _throughputs() -> Iterator[Quantity]:
    both = (("steady_state", "steady state"), ("whole_run", "whole run"))
    for key, label, unit in (
        ("output_tokens_per_s", "Output tok/s", "tok/s"),
        ("output_tokens_per_s_per_gpu", "Output tok/s per GPU", "tok/s"),
        ("total_tokens_per_s", "Total (input + output) tok/s", "tok/s"),
    ):
        for window, words in both:
            headline = key == "output_tokens_per_s"
            path = ("metrics", key, window)
            yield Quantity(path, f"{label}, {words}", unit, True, "Throughput", headline)
    yield Quantity(("metrics", "requests_per_s"), "Requests/s", "req/s", True, "Throughput")
    yield Quantity(("metrics", "goodput_requests_per_s"), "Goodput", "req/s", True, "Throughput")
    interactivity = ("metrics", "interactivity_tokens_per_s")
    yield Quantity((*interactivity, "p50"), "Output tok/s/user, median", "tok/s/user", True, "Throughput")
    yield Quantity((*interactivity, "p10"), "Output tok/s/user, slow p10", "tok/s/user", True, "Throughput")


def _latencies() -> Iterator[Quantity]:
    headlines = {"ttft_s": ("p50", "p99"), "tpot_s": ("p50",), "itl_s": ("p99",), "e2e_s": ("p50",)}
    for key, _, short in LATENCIES:
        for statistic in STATISTICS:
            headline = statistic in headlines.get(key, ())
            yield Quantity(
                ("metrics", key, statistic), f"{short} {statistic}", "s", False, "Latency", headline
            )


def _resources() -> Iterator[Quantity]:
    for key, label, better in (
        ("total_bytes", "Memory, total", False),
        ("weights_bytes", "Weights", False),
        ("kv_pool_bytes", "KV pool reserved", None),
        ("kv_used_peak_bytes", "KV used, peak", False),
        ("other_bytes", "Other memory", False),
        ("torch_allocated_peak_bytes", "Torch allocated, peak", False),
        ("torch_reserved_peak_bytes", "Torch reserved, peak", False),
        ("device_used_peak_minus_idle_bytes", "Device used, peak minus idle", False),
        ("host_rss_peak_bytes", "Host RSS, peak", False),
    ):
        yield Quantity(("memory", key), label, "bytes", better, "Memory", key == "total_bytes")
    joules = ("energy", "joules_per_output_token")
    yield Quantity(joules, "Energy per output token", "J/token", False, "Energy", True)
    yield Quantity(("roofline", "mbu"), "Memory bandwidth used (MBU)", "ratio", True, "Roofline", True)
    yield Quantity(("roofline", "mfu"), "FLOPs used (MFU)", "ratio", True, "Roofline", True)
    fit = ("roofline", "decode_fit")
    yield Quantity((*fit, "intercept_s"), "Decode step, intercept", "s", False, "Roofline")
    yield Quantity((*fit, "slope_s_per_token"), "Decode step, per context token", "s", False, "Roofline")


def _schedule() -> Iterator[Quantity]:
    for key, label in (("offered", "Offered"), ("achieved", "Achieved")):
        path = ("schedule", f"{key}_requests_per_s")
        yield Quantity(path, f"{label} requests/s", "req/s", None, "Schedule")
    yield Quantity(("schedule", "lag_s", "p50"), "Sending lag p50", "s", False, "Schedule")
    yield Quantity(("schedule", "lag_s", "p99"), "Sending lag p99", "s", False, "Schedule")
    yield Quantity(("schedule", "lag_s", "max"), "Sending lag max", "s", False, "Schedule")
    dispersion = ("schedule", "index_of_dispersion")
    yield Quantity(dispersion, "Index of dispersion of arrivals", "", None, "Schedule")
    cache = ("metrics", "prefix_cache")
    yield Quantity((*cache, "ideal"), "Prefix hit ratio, ideal", "ratio", None, "Prefix cache")
    yield Quantity((*cache, "realised"), "Prefix hit ratio, realised", "ratio", True, "Prefix cache")


def _correctness() -> Iterator[Quantity]:
    for key, label, unit, better in (
        ("max_abs_logprob_diff", "Max |Δ log-probability|", "nat", False),
        ("mean_abs_logprob_diff", "Mean |Δ log-probability|", "nat", False),
        ("top1_agreement", "Top-1 agreement", "ratio", True),
    ):
        yield Quantity(("correctness", key), label, unit, better, "Correctness")


QUANTITIES: tuple[Quantity, ...] = (
    *_throughputs(),
    *_latencies(),
    *_resources(),
    *_schedule(),
    *_correctness(),
)


def quantity(*path: str) -> Quantity:
    """The quantity at `path`, e.g. quantity("metrics", "ttft_s", "p50")."""
    return next(each for each in QUANTITIES if each.path == path)


def read(record: RunRecord, wanted: Quantity) -> Reading:
    """The quantity's value in `record`; never raises: what is absent says why."""
    found: Any = getattr(record, wanted.path[0])
    for key in wanted.path[1:]:
        found = found.get(key) if isinstance(found, dict) else None
    if isinstance(found, dict) and "value" in found:
        if found["value"] is None:
            return Reading(None, reason=found.get("unsupported") or NOT_MEASURED)
        return Reading(found["value"], found.get("low"), found.get("high"))
    if isinstance(found, dict) and "measured" in found:  # utilisation against a measured and a datasheet peak
        found = found["measured"]
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        return Reading(None, reason=NOT_MEASURED)
    return Reading(float(found))


_SCALES: dict[str, tuple[tuple[float, str], ...]] = {
    "s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"), (1e-12, "ps")),
    "bytes": ((2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B")),
    "J/token": ((1.0, "J/token"), (1e-3, "mJ/token"), (1e-6, "µJ/token")),
    "ratio": ((1e-2, "%"),),
}


def scale(value: float, unit: str) -> tuple[float, str]:
    """The factor and the name of the unit in which `value` reads best: (1e-3, "ms") for 0.02 s."""
    steps = _SCALES.get(unit, ((1.0, unit),))
    return next((step for step in steps if abs(value) >= step[0]), steps[0] if value == 0 else steps[-1])


def digits(value: float, count: int = 3) -> str:
    """`value` with `count` significant digits, with commas: 1236.5 -> "1,236", 0.04567 -> "0.0457"."""
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return "∞" if value > 0 else DASH
    rounded = float(f"{value:.{count}g}")
    magnitude = math.floor(math.log10(abs(rounded)))
    if magnitude < -4:
        return f"{value:.{count - 1}e}"
    return f"{value:,.{max(count - 1 - magnitude, 0)}f}"


def format_value(value: float | None, unit: str) -> str:
    """The value with its unit, e.g. "45.2 ms"; a dash when there is none."""
    if value is None:
        return DASH
    factor, name = scale(value, unit)
    return f"{digits(value / factor)}{'' if name == '%' else ' '}{name}".rstrip()


def format_interval(reading: Reading, unit: str) -> str:
    """The interval in the value's own unit, e.g. "41.0–49.3"; empty without one.

    A null upper end beside a lower one was infinite: failed requests reach into the interval.
    """
    if reading.value is None or reading.low is None:
        return ""
    factor, _ = scale(reading.value, unit)
    high = "∞" if reading.high is None else digits(reading.high / factor)
    return f"{digits(reading.low / factor)}–{high}"


def format_reading(reading: Reading, unit: str) -> str:
    """Value, unit and interval: "45.2 ms (41.0–49.3)"."""
    interval = format_interval(reading, unit)
    return format_value(reading.value, unit) + (f" ({interval})" if interval else "")


def format_ratio(value: float, decimals: int = 2) -> str:
    """ "1.12×"; with more digits where the decimals would say too little."""
    return f"{value:.{decimals}f}×" if 0.1 <= value < 1000 else f"{digits(value)}×"
