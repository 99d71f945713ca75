"""github-action-benchmark's custom tools: https://github.com/benchmark-action/github-action-benchmark

One of its files has one direction, so there are two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from backbench.reports.arms import Arm
from backbench.reports.export.format import Export, interval_words, values
from backbench.reports.quantities import Reading, digits

PARTS = {False: "smaller", True: "bigger"}
"""Higher is better -> the file's part: its `tool` is customSmallerIsBetter or customBiggerIsBetter."""


def write(arms: Sequence[Arm]) -> dict[str, Any]:
    """Every quantity with a direction, in its own unit; the interval is the entry's range."""
    found: dict[str, list[dict[str, Any]]] = {part: [] for part in PARTS.values()}
    for arm, quantity, reading in values(arms):
        if quantity.higher_is_better is None:
            continue
        entry = {
            "name": f"{arm.label}: {quantity.label}",
            "unit": quantity.unit,
            "value": reading.value,
            "extra": f"{interval_words(arm)}\n{quantity.definition}",
        }
        if (interval := _range(reading)) is not None:
            entry["range"] = interval
        found[PARTS[quantity.higher_is_better]].append(entry)
    return found


def _range(reading: Reading) -> str | None:
    if reading.low is None or reading.high is None:
        return None
    return f"{digits(reading.low, 4)} to {digits(reading.high, 4)}"


EXPORT = Export(
    "github-action-benchmark",
    "Two files, FILE.smaller.json and FILE.bigger.json, for its customSmallerIsBetter and "
    "customBiggerIsBetter.",
    write,
)
