"""Between runs: the sample is the run, and a pair of neighbouring runs is one observation.

Requests of one run share its machine, its clocks and its queue, so intervals within a run say nothing about
the next run. Everything here takes one number a run, or one difference a pair.

The test is the sign flip (Fisher 1935): without a difference, each pair's difference is as likely to have
either sign. Its statistic is the mean, its interval the same test inverted: the shifts that it does not
reject. Both follow from the means of all subsets of the sample (Hartigan 1969, "Using subsample values as
typical values"), so neither is sampled and no distribution is assumed but a symmetric one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import floor, sqrt

import numpy as np
from scipy.special import stdtrit

from backbench.reports.metrics.statistics import CONFIDENCE, Floats

MOST_PAIRS = 16
"""Pairs up to which every subset is looked at: 65,535 of them."""


@dataclass(frozen=True)
class Estimate:
    """A quantity over several runs or pairs; `low`, `high` are None where the sample carries no interval."""

    value: float
    low: float | None
    high: float | None
    n: int


def typical(values: Floats) -> Estimate:
    """The geometric mean of one positive number a run, with Student's interval of the logarithms.

    Run-to-run noise multiplies; on the logarithm it adds. One run has no interval.
    """
    logs = np.log(np.asarray(values, dtype=np.float64))
    n = len(logs)
    if n < 2:
        return Estimate(float(np.exp(logs.mean())), None, None, n)
    reach = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * standard_error(logs)
    low, mid, high = np.exp([logs.mean() - reach, logs.mean(), logs.mean() + reach])
    return Estimate(float(mid), float(low), float(high), n)


def difference(pairs: Floats) -> Estimate:
    """The typical difference of pairs: Hodges and Lehmann's estimate with the sign flip's interval.

    Too few pairs for that interval (below 6 for 95 %) take Student's, which assumes normal noise.
    """
    n = len(pairs)
    interval = sign_flip_interval(pairs)
    if interval is None and n >= 2:
        reach = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * standard_error(pairs)
        interval = float(pairs.mean()) - reach, float(pairs.mean()) + reach
    low, high = interval or (None, None)
    return Estimate(hodges_lehmann(pairs), low, high, n)


def standard_error(values: Floats) -> float:
    """Of the mean; needs two values."""
    return float(values.std(ddof=1)) / sqrt(len(values))


def hodges_lehmann(values: Floats) -> float:
    """The median of the Walsh averages (x_i + x_j) / 2, i <= j (Hodges & Lehmann 1963)."""
    first, second = np.triu_indices(len(values))
    return float(np.median((values[first] + values[second]) / 2))


def sign_flip(values: Floats) -> tuple[float, tuple[float, float] | None]:
    """`sign_flip_p` and `sign_flip_interval` at one go."""
    sums = _subset_sums(values)
    return _p(sums), _interval(sums, CONFIDENCE)


def sign_flip_p(values: Floats) -> float:
    """The exact one-sided p-value of "the centre is above zero" by sign flips of the mean.

    Flipping the signs of a subset leaves the mean no smaller just where the subset's own mean is at most
    zero; flipping none counts too.
    """
    return _p(_subset_sums(values))


def sign_flip_interval(values: Floats, confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """The shifts that the two-sided sign flip does not reject; None where so small a sample rejects none."""
    return _interval(_subset_sums(values), confidence)


def _p(sums: Floats) -> float:
    return (1 + int(np.count_nonzero(sums <= 0))) / (len(sums) + 1)


def _interval(sums: Floats, confidence: float) -> tuple[float, float] | None:
    subsets = len(sums) + 1
    place = floor((1 - confidence) / 2 * subsets) - 1
    if place < 0:
        return None
    means = sums / _sizes(subsets.bit_length() - 1)
    low, high = np.partition(means, (place, len(means) - 1 - place))[[place, -1 - place]]
    return float(low), float(high)


def _subset_sums(values: Floats) -> Floats:
    """Sums of the 2^n - 1 subsets that hold something, in the order of their bit patterns."""
    n = len(values)
    if not 1 <= n <= MOST_PAIRS:
        raise ValueError(f"A sign-flip test takes 1 to {MOST_PAIRS} pairs, not {n}.")
    sums = np.zeros(2**n)
    for place, value in enumerate(values):
        np.add(sums[: 1 << place], value, out=sums[1 << place : 2 << place])
    return sums[1:]


@lru_cache(maxsize=MOST_PAIRS)
def _sizes(n: int) -> Floats:
    """How many members each of those subsets has."""
    sizes = np.zeros(1)
    for _ in range(n):
        sizes = np.concatenate((sizes, sizes + 1))
    return sizes[1:]


def holm(p_values: Floats) -> Floats:
    """p-values adjusted so that none of several tests errs more often than one would (Holm 1979)."""
    order = np.argsort(p_values)
    steps = p_values[order] * np.arange(len(p_values), 0, -1)
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return adjusted
