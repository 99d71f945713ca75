"""The numbers of a record that a reader compares: read, and written for people."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from backbench.reports.metrics.catalogue import METRICS
from backbench.reports.metrics.metric import ABSENT, Quantity
from backbench.reports.record import RunRecord

NOT_MEASURED = "not measured"
DASH = "—"


@dataclass(frozen=True)
class Reading:
    """A quantity's value in one record, with its interval where there is one."""

    value: float | None
    low: float | None = None
    high: float | None = None
    reason: str | None = None
    """Why there is no value."""


QUANTITIES: tuple[Quantity, ...] = tuple(each for metric in METRICS for each in metric.quantities())
"""What tables, comparisons and the page show, in order."""


def quantity(*path: str) -> Quantity:
    """The quantity at `path`, e.g. quantity("metrics", "ttft_s", "p50")."""
    return next(each for each in QUANTITIES if each.path == path)


def read(record: RunRecord, wanted: Quantity) -> Reading:
    """The quantity's value in `record`; never raises: what is absent says why."""
    found: Any = getattr(record, wanted.path[0])
    for key in wanted.path[1:]:
        found = found.get(key) if isinstance(found, dict) else None
    if isinstance(found, dict) and "value" in found:
        if not _is_number(found["value"]):
            return Reading(None, reason=found.get("unsupported") or NOT_MEASURED)
        return Reading(found["value"], found.get("low"), found.get("high"))
    path = wanted.path
    if isinstance(found, dict) and "measured" in found:  # utilisation against a measured and a datasheet peak
        found, path = found["measured"], (*path, "measured")
    if not _is_number(found) or not math.isfinite(found):
        return Reading(None, reason=_reason(record, path))
    return Reading(float(found))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _reason(record: RunRecord, path: tuple[str, ...]) -> str:
    """Why the value at `path`, or one around it, is null."""
    section = getattr(record, path[0])
    reasons = section.get(ABSENT) or {}
    around = (".".join(path[1 : end + 1]) for end in range(len(path), 1, -1))
    whole = str(section.get("reason") or NOT_MEASURED)
    return next((str(reasons[name]) for name in around if name in reasons), whole)


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
