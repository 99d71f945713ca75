"""Step time of plain decodes by sequences and context: separates engine from kernel without a profiler.

    step time = intercept + per sequence * sequences + slope * context tokens

The intercept is the weights, and by the host's stamps the host, too; the slope is reading the KV cache. Where
the device timed its steps by events, its times are what is fitted. Sequences have a term of their own: in a
run that fills and drains, steps of more sequences also have more context, and a fit without the term would
lay what each sequence costs at the KV read's door.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from backbench.reports.metrics.metric import Metric, Missing, Part
from backbench.reports.metrics.run import RunTables
from backbench.reports.metrics.steps import decode_times_ns, plain_decodes

if TYPE_CHECKING:
    import pandas as pd

    from backbench.reports.metrics.statistics import Floats

MIN_STEPS = 16
DEVICE_EVENTS = "device events"
"""What `timed_by` says of a fit to the device's own times; a fit to the host's stamps has no such field."""
MOST_SHARED = 0.99
"""A term whose variance the other terms explain this far (R^2) is not identified: its standard error is
ten times that of a term alone."""
MIN_R_SQUARED = 0.1
"""Terms that explain less of the step times' variance are not what a step costs: over thousands of steps a
slope is told from zero that moves no step by as much as its neighbours differ."""
MIN_T = 2.0
"""A slope nearer to zero than two standard errors is not distinguished from zero."""

TERMS = ("intercept_s", "per_sequence_s", "slope_s_per_token")
ERRORS = ("intercept_se_s", "per_sequence_se_s", "slope_se_s_per_token")


def floors(shape: Mapping[str, Any] | None, peaks: Mapping[str, Any]) -> dict[str, float | Missing]:
    """The physical floors: bytes over measured memory bandwidth."""
    bandwidth = peaks.get("measured_bytes_per_s")
    if shape is None or not bandwidth:
        unknown = Missing("the model's shape or the device's measured bandwidth is unknown")
        return {"intercept_floor_s": unknown, "slope_floor_s_per_token": unknown}
    return {
        "intercept_floor_s": shape["weight_bytes_per_step"] / bandwidth,
        "slope_floor_s_per_token": shape["kv_bytes_per_token"] / bandwidth,
    }


def fit(steps: pd.DataFrame, floor: Mapping[str, float | Missing]) -> dict[str, Any]:
    """Ordinary least squares over the plain decode steps, with standard errors and R^2.

    Fewer than 16 such steps, or all with the same context, give no fit. Where every step had as many
    sequences as the others, their term is part of the intercept. A term that the steps do not identify, or
    a slope that is negative or not distinguished from zero, is `Missing`, as are all where they explain next
    to nothing (R^2): it would name a cause that the steps do not show.
    """
    chosen = plain_decodes(steps)
    times_ns, on_device = decode_times_ns(steps)
    seconds = times_ns / 1e9
    tokens = steps["context_tokens"].to_numpy(dtype=np.float64)[chosen]
    sequences = steps["num_seqs"].to_numpy(dtype=np.float64)[chosen]
    head: dict[str, Any] = {"steps": len(seconds), **floor}
    if on_device:
        head["timed_by"] = DEVICE_EVENTS
    if len(seconds) < MIN_STEPS:
        return head | _nothing(f"{len(seconds)} plain decode steps, {MIN_STEPS} needed")
    if not np.ptp(tokens):
        return head | _nothing("every decode step had the same context")
    head["median_sequences"] = float(np.median(sequences))
    alone = not np.ptp(sequences)
    columns = [tokens] if alone else [sequences, tokens]
    if not alone and _explained(tokens, sequences) > MOST_SHARED:
        return head | _nothing("context and sequences grew together: their shares cannot be told apart")
    found, errors, squared = _least_squares(columns, seconds)
    names = [0, 2] if alone else [0, 1, 2]
    values: dict[str, Any] = {}
    for place, value, error in zip(names, found, errors, strict=True):
        values |= {TERMS[place]: float(value), ERRORS[place]: float(error)}
    if alone:
        same = Missing("every decode step had the same number of sequences")
        values |= {TERMS[1]: same, ERRORS[1]: same}
    return head | _withheld(values, squared) | {"r_squared": squared}


def _least_squares(columns: list[Floats], seconds: Floats) -> tuple[Floats, Floats, float | Missing]:
    """Coefficients (the constant first), their standard errors, R^2; columns are scaled for the solver."""
    scales = np.array([1.0, *(np.abs(each).max() for each in columns)])
    matrix = np.column_stack([np.ones(len(seconds)), *columns]) / scales
    inverse = np.linalg.inv(matrix.T @ matrix)
    found = inverse @ matrix.T @ seconds
    residual = seconds - matrix @ found
    variance = float(residual @ residual) / (len(seconds) - matrix.shape[1])
    errors = np.sqrt(variance * np.diag(inverse))
    total = float(((seconds - seconds.mean()) ** 2).sum())
    squared: float | Missing = Missing("every step took the same time")
    if total:
        squared = 1 - float(residual @ residual) / total
    return found / scales, errors / scales, squared


def _explained(one: Floats, other: Floats) -> float:
    """R^2 of one column by the other."""
    a, b = one - one.mean(), other - other.mean()
    return float((a @ b) ** 2 / ((a @ a) * (b @ b)))


def _withheld(values: dict[str, Any], squared: float | Missing) -> dict[str, Any]:
    """The terms that mean what they are called; the intercept only beside a slope that stands."""
    slope, error = values["slope_s_per_token"], values["slope_se_s_per_token"]
    if slope <= 0 or slope < MIN_T * error:
        why = "the slope is negative" if slope <= 0 else "the slope is not distinguished from zero"
        return values | dict.fromkeys((*TERMS, *ERRORS), Missing(f"{why}: other work hides the KV read"))
    if not isinstance(squared, Missing) and squared < MIN_R_SQUARED:
        why = f"the terms explain {squared:.0%} of the step times' variance, {MIN_R_SQUARED:.0%} needed"
        return values | dict.fromkeys((*TERMS, *ERRORS), Missing(why))
    for term, its_error in zip(TERMS[:2], ERRORS[:2], strict=True):
        if not isinstance(values[term], Missing) and values[term] <= 0:
            negative = Missing("it is negative: the step time is no line in these terms")
            values = values | {term: negative, its_error: negative}
    return values


def _nothing(why: str) -> dict[str, Any]:
    return dict.fromkeys((*TERMS, *ERRORS, "r_squared"), Missing(why)) | {"reason": why}


def line(fit: Mapping[str, Any], context: Floats, floor: bool = False) -> Floats | None:
    """The fitted step time (s) of the median number of sequences, or its floor, at each context; None where
    the record has none."""
    names = (
        ("intercept_floor_s", "slope_floor_s_per_token") if floor else ("intercept_s", "slope_s_per_token")
    )
    intercept, slope = (fit.get(name) for name in names)
    if intercept is None or slope is None:
        return None
    more = 0.0 if floor else (fit.get("per_sequence_s") or 0.0) * (fit.get("median_sequences") or 0.0)
    found: Floats = intercept + more + slope * context
    return found


def _of(run: RunTables) -> dict[str, Any]:
    return fit(run.steps, floors(run.context.shape, run.context.peaks))


METRICS: tuple[Metric, ...] = (
    Metric(
        ("roofline", "decode_fit"),
        "Decode step, ",
        "s",
        False,
        "Step time of the decode-only steps as intercept + per sequence + slope x context tokens.",
        _of,
        "Roofline",
        parts=(
            Part("intercept_s", "intercept"),
            Part("per_sequence_s", "per sequence"),
            Part("slope_s_per_token", "per context token"),
        ),
        since=2,
    ),
)
