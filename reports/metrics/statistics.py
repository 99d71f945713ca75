"""Quantiles with distribution-free intervals, and the summary of one metric."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

CONFIDENCE = 0.95
LEVELS = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}


def quantile(ordered: Floats, level: float) -> float:
    """numpy's linear quantile of ascending values, defined for +inf too (numpy gives NaN next to it)."""
    position = level * (len(ordered) - 1)
    below = math.floor(position)
    fraction = position - below
    if fraction == 0 or ordered[below] == ordered[below + 1]:
        return float(ordered[below])
    return float(ordered[below] + fraction * (ordered[below + 1] - ordered[below]))


def interval_ranks(n: int, level: float, confidence: float = CONFIDENCE) -> tuple[int, int] | None:
    """1-based ranks (l, u) such that [x_(l), x_(u)] covers the quantile with at least `confidence`.

    The number of observations at or below the true quantile is Binomial(n, level), whatever the
    distribution (David & Nagaraja, Order Statistics, 2003, section 7.1). Each tail gets half of
    1 - confidence. None where n is too small for both ends to exist: below 6 for the median, 36 for
    p90 and p10, 72 for p95, 368 for p99.
    """
    tail = (1 - confidence) / 2
    # The mass further than 12 standard deviations from the mean is far below any tail used here.
    spread = 12 * math.sqrt(n * level * (1 - level)) + 12
    first = max(0, math.floor(n * level - spread))
    last = min(n, math.ceil(n * level + spread))
    counts = range(first, last + 1)
    log_n = math.lgamma(n + 1)
    mass = np.array(
        [
            math.exp(
                log_n
                - math.lgamma(k + 1)
                - math.lgamma(n - k + 1)
                + k * math.log(level)
                + (n - k) * math.log1p(-level)
            )
            for k in counts
        ]
    )
    below = np.concatenate(([0.0], np.cumsum(mass)))  # below[i] = P(count < first + i)
    above = np.concatenate((np.cumsum(mass[::-1])[::-1], [0.0]))  # above[i] = P(count >= first + i)
    lower = first + int(np.flatnonzero(below <= tail)[-1])
    upper = first + int(np.flatnonzero(above <= tail)[0])
    if lower < 1 or upper > n:
        return None
    return lower, upper


def needed_sample(level: float, confidence: float = CONFIDENCE) -> int:
    """The smallest sample for which the quantile has a two-sided interval."""
    tail = (1 - confidence) / 2
    return math.ceil(math.log(tail) / math.log(max(level, 1 - level)))


def estimate(ordered: Floats, level: float, clusters: int | None = None) -> dict[str, Any]:
    """One quantile with its interval: {value, low, high}, or nulls and why in `unsupported`.

    `clusters` is the number of independent units (requests) that pooled values come from. Values of
    one request move together, so the interval's ranks are those of a sample of `clusters`, mapped
    onto the pooled values: never too narrow, however strong the dependence.
    """
    n = len(ordered)
    units = n if clusters is None else min(n, clusters)
    ranks = interval_ranks(units, level) if units else None
    if ranks is None:
        reason = f"not supported at this sample size: needs {needed_sample(level)} requests, has {units}"
        return {"value": None, "low": None, "high": None, "unsupported": reason}
    value = quantile(ordered, level)
    if units == n:
        low, high = float(ordered[ranks[0] - 1]), float(ordered[ranks[1] - 1])
    else:
        low = float(ordered[math.floor((ranks[0] - 1) / units * n)])
        high = float(ordered[min(n, math.ceil(ranks[1] / units * n)) - 1])
    result: dict[str, Any] = {"value": value, "low": low, "high": high}
    if math.isinf(value):
        result["unsupported"] = "infinite: so many requests failed that the quantile falls among them"
    return result


def summarise(
    values: Sequence[float] | Floats,
    *,
    failures: int = 0,
    clusters: int | None = None,
    levels: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Summary of one metric: count, failures, mean, sd, min, max (of the measured values) and quantiles.

    Failures enter the quantiles as +inf, never the mean. NaN or negative values are the caller's error.
    """
    measured = np.sort(np.asarray(values, dtype=np.float64))
    ordered = np.concatenate((measured, np.full(failures, np.inf)))
    summary: dict[str, Any] = {"count": len(measured), "failures": failures}
    if len(measured):
        summary |= {
            "mean": float(measured.mean()),
            "sd": float(measured.std(ddof=1)) if len(measured) > 1 else None,
            "min": float(measured[0]),
            "max": float(measured[-1]),
        }
    else:
        summary |= {"mean": None, "sd": None, "min": None, "max": None}
    for name, level in (levels or LEVELS).items():
        summary[name] = estimate(ordered, level, None if clusters is None else clusters + failures)
    return summary
