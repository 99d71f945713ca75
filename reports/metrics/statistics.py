"""Quantiles with distribution-free intervals, and the summary of one metric."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.integer[Any]]

CONFIDENCE = 0.95
SEED = 20_240_229
MOST_DRAWS, FEWEST_DRAWS, DRAWN_VALUES = 500, 100, 100_000_000
"""Draws of a bootstrap: 500, fewer where that would draw more values than a second allows."""
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


def estimate(ordered: Floats, level: float) -> dict[str, Any]:
    """One quantile with its interval: {value, low, high}, or nulls and why in `unsupported`."""
    n = len(ordered)
    ranks = interval_ranks(n, level) if n else None
    if ranks is None:
        return _unsupported(level, n)
    low, high = float(ordered[ranks[0] - 1]), float(ordered[ranks[1] - 1])
    return _told({"value": quantile(ordered, level), "low": low, "high": high})


def estimate_pooled(values: Floats, owners: Ints, levels: Mapping[str, float]) -> dict[str, Any]:
    """Quantiles of values pooled from requests, each with an interval over the requests.

    Values of one request move together, and a long request gives more of them: so whole requests are drawn
    again, with replacement, and the interval spans the middle 95 % of the quantiles of such draws (the
    cluster bootstrap's percentile interval: Davison & Hinkley, Bootstrap Methods, 1997, section 3.8).
    `owners[i]` is the request that `values[i]` came from. As many requests are needed as for a quantile
    of one value a request.
    """
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    names, owner = np.unique(owners, return_inverse=True)
    owner = owner[order].astype(np.int32)
    supported = {name: level for name, level in levels.items() if _enough(len(names), level)}
    found = {name: _unsupported(level, len(names)) for name, level in levels.items()}
    if not supported:
        return found
    drawn = _redrawn(ordered, owner, len(names), list(supported.values()))
    tail = (1 - CONFIDENCE) / 2
    for place, (name, level) in enumerate(supported.items()):
        value, seen = quantile(ordered, level), np.sort(drawn[:, place])
        low, high = quantile(seen, tail), quantile(seen, 1 - tail)
        found[name] = {"value": value, "low": min(low, value), "high": max(high, value)}
    return found


def _redrawn(ordered: Floats, owner: Ints, requests: int, levels: list[float]) -> Floats:
    """f64[draws, levels]: the quantiles of draws of whole requests."""
    # RandomState's stream never changes between versions of numpy: a record must verify anywhere.
    random = np.random.RandomState(SEED)
    draws = max(FEWEST_DRAWS, min(MOST_DRAWS, DRAWN_VALUES // len(ordered)))
    found = np.empty((draws, len(levels)))
    for draw in range(draws):
        weights = np.bincount(random.randint(0, requests, requests), minlength=requests)
        upto = np.cumsum(weights[owner])
        places = np.floor(np.multiply(levels, upto[-1] - 1)).astype(np.int64)
        found[draw] = ordered[np.searchsorted(upto, places, side="right")]
    return found


def _enough(units: int, level: float) -> bool:
    return units > 0 and interval_ranks(units, level) is not None


def _unsupported(level: float, units: int) -> dict[str, Any]:
    reason = f"not supported at this sample size: needs {needed_sample(level)} requests, has {units}"
    return {"value": None, "low": None, "high": None, "unsupported": reason}


def _told(found: dict[str, Any]) -> dict[str, Any]:
    """With a reason beside what is infinite, which a record can only hold as null."""
    if math.isinf(found["value"]):
        found["unsupported"] = "infinite: so many requests failed that the quantile falls among them"
    elif math.isinf(found["high"]):
        found["reason"] = "the upper end is infinite: failed requests reach into the interval"
    return found


def summarise(
    values: Sequence[float] | Floats,
    *,
    failures: int = 0,
    owners: Ints | None = None,
    levels: Mapping[str, float] = LEVELS,
) -> dict[str, Any]:
    """Summary of one metric: count, failures, mean, sd, min, max (of the measured values) and quantiles.

    `failures` requests have no value: they failed or were cut off, and enter the quantiles as +inf, never
    the mean. With `owners` (one a value) the values are pooled from requests: see `estimate_pooled`. NaN or
    negative values are the caller's error.
    """
    given = np.asarray(values, dtype=np.float64)
    measured = np.sort(given)
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
    if len(measured) < 2:
        summary["reason"] = "one value has no spread" if len(measured) else "no request gave a value"
    if owners is not None:
        return summary | estimate_pooled(given, owners, levels)
    ordered = np.concatenate((measured, np.full(failures, np.inf)))
    return summary | {name: estimate(ordered, level) for name, level in levels.items()}


def wilson(successes: int, trials: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The interval of a share (Wilson, JASA 22, 1927): it has its level near 0 and 1, too, where an SLO is.

    Without a trial it is all of [0, 1].
    """
    if not trials:
        return 0.0, 1.0
    z2 = NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    share = successes / trials
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = math.sqrt(z2 * (share * (1 - share) + z2 / (4 * trials)) / trials) / (1 + z2 / trials)
    return max(0.0, centre - half), min(1.0, centre + half)


def wilson_trials(level: float, confidence: float = CONFIDENCE) -> int:
    """The fewest trials, all successes, whose interval lies above `level`."""
    z2 = NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    return math.ceil(z2 * level / (1 - level))
