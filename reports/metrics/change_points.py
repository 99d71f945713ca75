"""Where a series changed its level: binary segmentation with a rank test.

A stretch is split where Pettitt's statistic (1979) is largest, the most that the ranks before a place differ
from those after it, if fewer than `ALARM` of its own permutations reach as much; then each side likewise.
Ranks make one odd day one odd rank, and permutations assume nothing of the values but that without a change
every order of them is as likely: a series without one is split with probability `ALARM`, however long it is.
Days that resemble their neighbours (a slow drift) are no such series, and are split more often.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.stats import rankdata

from backbench.reports.metrics.statistics import Floats

ALARM = 0.01
"""The false-alarm rate of a series."""
PERMUTATIONS = 999
SEED = 1979
FEWEST = 10
"""Values below which no order of them is rarer than `ALARM`: of 8 one in 35 is as uneven as can be."""


@dataclass(frozen=True)
class Change:
    """The level before and from `index` on, each the median up to the next change."""

    index: int
    before: float
    after: float
    p: float


def change_points(values: Sequence[float]) -> list[Change]:
    """The changes of a series, in its order."""
    series = np.asarray(values, dtype=np.float64)
    found: dict[int, float] = {}
    _split(series, 0, len(series), np.random.default_rng(SEED), found)
    places = [0, *sorted(found), len(series)]
    levels = [float(np.median(series[a:b])) for a, b in pairwise(places) if b > a]
    return [Change(place, levels[i], levels[i + 1], found[place]) for i, place in enumerate(places[1:-1])]


def _split(series: Floats, start: int, end: int, rng: np.random.Generator, found: dict[int, float]) -> None:
    """Add the changes inside [start, end) to `found`: index -> p."""
    if end - start < FEWEST:
        return
    ranks = rankdata(series[start:end])
    place, most = _pettitt(ranks[None])
    _, others = _pettitt(rng.permuted(np.tile(ranks, (PERMUTATIONS, 1)), axis=1))
    p = (1 + int(np.count_nonzero(others >= most[0]))) / (1 + PERMUTATIONS)
    if p > ALARM:
        return
    middle = start + int(place[0]) + 1
    found[middle] = p
    _split(series, start, middle, rng, found)
    _split(series, middle, end, rng, found)


def _pettitt(ranks: Floats) -> tuple[np.ndarray, Floats]:
    """Where and how large |2 (r_1 + ... + r_k) - k (n + 1)| is at its largest, a row: f64[rows, n]."""
    n = ranks.shape[1]
    uneven = np.abs(2 * np.cumsum(ranks, axis=1) - np.arange(1, n + 1) * (n + 1))[:, :-1]
    return uneven.argmax(axis=1), uneven.max(axis=1)
