"""Is the answer right: totals of the log-probability differences that the check found."""

from __future__ import annotations

from typing import Any

import numpy as np

from backbench.reports.metrics.metric import Metric, Missing, Part
from backbench.reports.metrics.run import RunTables
from backbench.reports.metrics.statistics import Floats

KEPT = "differences"
"""The section's list of absolute differences, one a position, where the check keeps them."""


def kept(run: RunTables) -> Floats | None:
    """The per-position differences of the record; None where it holds none."""
    found = (run.given.get("correctness") or {}).get(KEPT)
    if not isinstance(found, list) or not found:
        return None
    parts = [each if isinstance(each, list) else [each] for each in found]
    return np.array([value for part in parts for value in part], dtype=np.float64)


def _total(reduce: Any) -> Any:
    def value(run: RunTables) -> float | Missing:
        differences = kept(run)
        return Missing("no differences were kept") if differences is None else float(reduce(differences))

    return value


def _correctness(
    key: str, label: str, unit: str, better: bool, definition: str, compute: Any = None, summary: bool = False
) -> Metric:
    parts = (Part(summary=summary),)
    path = ("correctness", key)
    return Metric(path, label, unit, better, definition, compute, "Correctness", parts=parts)


METRICS: tuple[Metric, ...] = (
    _correctness(
        "max_abs_logprob_diff",
        "Max |Δ log-probability|",
        "nat",
        False,
        "Largest difference of teacher-forced log-probabilities from the torch backend's.",
        _total(np.max),
        summary=True,
    ),
    _correctness(
        "mean_abs_logprob_diff",
        "Mean |Δ log-probability|",
        "nat",
        False,
        "Mean difference of teacher-forced log-probabilities from the torch backend's.",
        _total(np.mean),
    ),
    _correctness(
        "top1_agreement",
        "Top-1 agreement",
        "ratio",
        True,
        "Share of the positions whose most probable token is the torch backend's.",
        summary=True,
    ),
)
