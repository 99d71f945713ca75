"""Bencher Metric Format: https://bencher.dev/docs/reference/bencher-metric-format"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from backbench.reports.arms import Arm
from backbench.reports.export.format import Export, values
from backbench.reports.limits import names_of


def write(arms: Sequence[Arm]) -> dict[str, Any]:
    """A benchmark an arm, a measure a quantity in its own unit; the interval as lower and upper value."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for arm, quantity, reading in values(arms):
        ends = {"value": reading.value, "lower_value": reading.low, "upper_value": reading.high}
        known = {name: end for name, end in ends.items() if end is not None}
        found.setdefault(arm.label, {})[names_of(quantity)[1].replace("_", "-")] = known
    return {"": found}


EXPORT = Export("bencher", "Bencher Metric Format, for `bencher run --adapter json --file FILE`.", write)
