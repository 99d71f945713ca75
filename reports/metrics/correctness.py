"""Is the answer right: totals of the log-probability differences that the check found."""

from __future__ import annotations

from collections.abc import Iterator
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
    return np.array(found, dtype=np.float64) if isinstance(found, list) and found else None


def _total(reduce: Any) -> Any:
    def value(run: RunTables) -> float | Missing:
        differences = kept(run)
        return Missing("no differences were kept") if differences is None else float(reduce(differences))

    return value


def _worst_sequence(run: RunTables) -> float | Missing:
    """Every sequence of the sample has as many positions."""
    differences, sequences = kept(run), (run.given.get("correctness") or {}).get("sequences")
    if differences is None or not isinstance(sequences, int) or len(differences) % sequences:
        return Missing("no differences were kept")
    return float(differences.reshape(sequences, -1).mean(axis=1).max())


def contradictions(section: dict[str, Any]) -> Iterator[str]:
    """Why a section that says passed cannot have."""
    if section.get("passed") is not True:
        return
    for name, bound in BOUNDS.items():
        value, most = section.get(name), section.get(bound)
        if value is not None and most is not None and not value <= most:
            yield f"correctness.passed is True, but {name} is {value!r} and {bound} {most!r}"
    for part in ("attention", "products"):
        if (section.get(part) or {}).get("passed") is False:
            yield f"correctness.passed is True, but correctness.{part}.passed is False"


def _correctness(
    key: str, label: str, unit: str, better: bool, definition: str, compute: Any = None, summary: bool = False
) -> Metric:
    parts = (Part(summary=summary),)
    path = ("correctness", key)
    return Metric(path, label, unit, better, definition, compute, "Correctness", parts=parts)


BOUNDS = {
    "max_abs_logprob_diff": "tolerance",
    "mean_abs_logprob_diff": "tolerance_mean",
    "worst_sequence_mean_abs_logprob_diff": "tolerance_sequence_mean",
}
"""A total -> the bound it must not exceed."""

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
    Metric(
        ("correctness", "worst_sequence_mean_abs_logprob_diff"),
        "Worst sequence's mean |Δ log-probability|",
        "nat",
        False,
        "Largest mean difference of one sequence of the sample.",
        _worst_sequence,
        parts=(),
    ),
    Metric(
        ("correctness", "tokens"),
        "Positions compared",
        "tokens",
        None,
        "Positions whose log-probabilities were compared.",
        _total(len),
        parts=(),
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
