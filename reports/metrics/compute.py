"""From a run's tables to the record's numbers: every metric of the catalogue, in its place.

Everything here is a pure function of the tables and a `Context`, which is why `bench verify` can recompute a
stranger's record. docs/metrics.md defines every name.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from backbench.reports.metrics.catalogue import METRIC_SCHEMA, METRICS
from backbench.reports.metrics.metric import Metric, resolved
from backbench.reports.metrics.run import RunTables

if TYPE_CHECKING:
    import pandas as pd

    from backbench.reports.metrics.requests import Context
SLO_NAMES = ("ttft", "tpot", "e2e")
SECTIONS = ("metrics", "schedule", "roofline")
"""Those that follow from requests and steps alone."""


def compute(requests: pd.DataFrame, steps: pd.DataFrame, context: Context) -> dict[str, dict[str, Any]]:
    """The record's sections that follow from requests and steps: metrics, schedule, roofline."""
    return sections(RunTables.read(requests, steps, context), SECTIONS)


def sections(
    run: RunTables, names: Iterable[str], metrics: Iterable[Metric] = METRICS
) -> dict[str, dict[str, Any]]:
    """The named sections of a record, as far as `metrics` give them. Nulls have their reasons beside them."""
    found: dict[str, Any] = {name: {} for name in names}
    for metric in metrics:
        if metric.compute is None or metric.path[0] not in found:
            continue
        *parents, last = metric.path
        place = found
        for key in parents:
            place = place.setdefault(key, {})
        value = metric.compute(run)
        # A metric may be a whole section beside others that have places inside it.
        place[last] = place[last] | value if isinstance(place.get(last), dict) and place[last] else value
    if "metrics" in found:
        found["metrics"]["schema"] = METRIC_SCHEMA
    return {name: resolved(section) for name, section in found.items()}
