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
from scipy.special import stdtr, stdtrit

from backbench.reports.metrics.statistics import CONFIDENCE, Floats

CHANCE = 0.01
"""Of calling equal arms better or worse: one verdict in a hundred may be false. Whoever compares a campaign
reads hundreds, and acts on the coloured ones; intervals, which a reader weighs, are at `CONFIDENCE`."""
FEWEST_PAIRS = 8
"""Pairs from which the sign flip can reject anything at that chance from both sides: 2 of 256 flips."""
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
    reach = student_reach(n - 1) * standard_error(logs)
    low, mid, high = np.exp([logs.mean() - reach, logs.mean(), logs.mean() + reach])
    return Estimate(float(mid), float(low), float(high), n)


def difference(pairs: Floats) -> Estimate:
    """The typical difference of pairs: Hodges and Lehmann's estimate with the sign flip's interval.

    Too few pairs for that interval (below six) take Student's, which assumes normal noise.
    """
    n = len(pairs)
    interval = sign_flip_interval(pairs)
    if interval is None and n >= 2:
        reach = student_reach(n - 1) * standard_error(pairs)
        interval = float(pairs.mean()) - reach, float(pairs.mean()) + reach
    low, high = interval or (None, None)
    return Estimate(hodges_lehmann(pairs), low, high, n)


def difference_p(pairs: Floats) -> float:
    """The two-sided p-value of "there is a difference": the sign flip's where so many pairs can reject at
    `CHANCE` and all flips can be looked at, else Student's."""
    if not FEWEST_PAIRS <= len(pairs) <= MOST_PAIRS:
        return student_p(pairs)
    sums = _subset_sums(pairs)
    return min(1.0, 2 * min(_p(sums), _p(-sums)))


def standard_error(values: Floats) -> float:
    """Of the mean; needs two values."""
    return float(values.std(ddof=1)) / sqrt(len(values))


def student_reach(freedom: float) -> float:
    """Standard errors to each side of a mean in Student's interval."""
    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2))


def student_p(pairs: Floats) -> float:
    """Student's two-sided p-value of "the mean is not zero"."""
    return _student_p(float(pairs.mean()), standard_error(pairs), len(pairs) - 1)


def welch(before: Floats, after: Floats) -> tuple[float, float]:
    """(standard error of the difference of means, degrees of freedom), however each spreads (Welch 1947)."""
    errors = [standard_error(each) ** 2 for each in (before, after)]
    total = sum(errors)
    parts = sum(error**2 / (len(each) - 1) for error, each in zip(errors, (before, after), strict=True))
    return sqrt(total), total**2 / parts if parts else 1.0


def welch_p(before: Floats, after: Floats) -> float:
    """The two-sided p-value of "the means differ"."""
    error, freedom = welch(before, after)
    return _student_p(float(after.mean() - before.mean()), error, freedom)


def _student_p(value: float, error: float, freedom: float) -> float:
    if error == 0:
        return float(value == 0)
    return 2 * float(stdtr(freedom, -abs(value) / error))


def joint_sign_flip_p(pairs: Floats) -> Floats:
    """Two-sided sign-flip p-values of the columns of f64[pairs, quantities], adjusted for all of them.

    Without a difference the arms of a pair might have changed places in all quantities at once: so all flip
    together, and each quantity is held against the largest of all under every flip (Westfall & Young 1993,
    maxT): what quantities have in common is allowed for without being known. A quantity's statistic is its
    sum over the root of its sum of squares, which no flip changes.
    """
    n = len(pairs)
    scale = np.sqrt((pairs**2).sum(axis=0))
    unit = np.divide(pairs, scale, out=np.zeros_like(pairs), where=scale > 0)
    # Half of all flips: the other half has every sum negated.
    flips = 1 - 2 * ((np.arange(1 << (n - 1))[:, None] >> np.arange(n)) & 1)
    largest = np.abs(flips @ unit).max(axis=1)
    found = np.abs(unit.sum(axis=0))
    # What ties but for the order of its sums is a tie: n sums of terms up to 1.
    return np.array([np.mean(largest >= each - n * 1e-12) for each in found])


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
