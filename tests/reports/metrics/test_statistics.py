"""Quantiles and their distribution-free intervals."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backbench.reports.metrics.statistics import (
    estimate,
    estimate_pooled,
    interval_ranks,
    needed_sample,
    quantile,
    summarise,
    wilson,
    wilson_trials,
)


@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=50),
    st.sampled_from([0.1, 0.5, 0.9, 0.95, 0.99]),
)
def test_quantile_is_numpy_linear(values: list[float], level: float) -> None:
    ordered = np.sort(np.array(values))
    assert quantile(ordered, level) == pytest.approx(np.quantile(ordered, level), rel=1e-12, abs=1e-9)


def test_the_summary_of_three_values_by_hand() -> None:
    """Mean 4, deviations -3, -1, 4: a sample's variance is 26 / 2."""
    found = summarise([3.0, 1.0, 8.0])
    assert (found["count"], found["mean"], found["min"], found["max"]) == (3, 4.0, 1.0, 8.0)
    assert found["sd"] == pytest.approx(math.sqrt(13))


def test_quantile_between_a_number_and_infinity_is_infinity() -> None:
    ordered = np.array([1.0, 2.0, math.inf])
    assert quantile(ordered, 0.5) == 2.0
    assert quantile(ordered, 0.75) == math.inf
    assert quantile(np.array([math.inf, math.inf]), 0.5) == math.inf


@pytest.mark.parametrize(("level", "n"), [(0.5, 6), (0.9, 36), (0.1, 36), (0.95, 72), (0.99, 368)])
def test_smallest_supported_samples(level: float, n: int) -> None:
    assert needed_sample(level) == n
    assert interval_ranks(n - 1, level) is None
    assert interval_ranks(n, level) is not None


@pytest.mark.parametrize(("n", "level"), [(100, 0.5), (400, 0.95), (1000, 0.99), (40, 0.1)])
def test_interval_covers_as_often_as_it_says(n: int, level: float) -> None:
    """Uniform samples; the true quantile is `level`. 2000 draws: a coverage of 0.95 has an sd of 0.005."""
    ranks = interval_ranks(n, level)
    assert ranks is not None
    samples = np.sort(np.random.default_rng(0).random((2000, n)), axis=1)
    covered = (samples[:, ranks[0] - 1] <= level) & (level <= samples[:, ranks[1] - 1])
    assert 0.94 <= covered.mean() <= 0.99


def test_unsupported_percentiles_say_so_and_hold_no_number() -> None:
    summary = summarise(np.arange(71.0))
    assert summary["p90"]["value"] is not None
    assert summary["p95"]["value"] is None
    assert summary["p95"]["unsupported"] == ("not supported at this sample size: needs 72 requests, has 71")
    assert summarise(np.arange(72.0))["p95"]["value"] == pytest.approx(np.quantile(np.arange(72.0), 0.95))


def test_failures_are_infinite_in_quantiles_and_absent_from_the_mean() -> None:
    summary = summarise([1.0] * 8, failures=2)
    assert summary["count"] == 8
    assert summary["mean"] == 1.0
    assert summary["p50"]["value"] == 1.0
    assert summary["p50"]["high"] == math.inf
    worse = summarise([1.0] * 4, failures=6)
    assert worse["p50"]["value"] == math.inf
    assert "failed" in worse["p50"]["unsupported"]


def test_pooled_values_are_judged_by_their_requests() -> None:
    """A thousand gaps of ten requests are ten samples, not a thousand."""
    gaps, owners = np.arange(1000.0), np.repeat(np.arange(10), 100)
    found = estimate_pooled(gaps, owners, {"p50": 0.5, "p95": 0.95})
    assert found["p95"]["value"] is None
    assert "has 10" in found["p95"]["unsupported"]
    pooled, independent = found["p50"], estimate(gaps, 0.5)
    assert pooled["value"] == independent["value"] == 499.5
    assert pooled["low"] < independent["low"] < independent["high"] < pooled["high"]


def test_a_pooled_interval_covers_where_requests_differ_in_length_and_pace() -> None:
    """Slow requests are long: the pooled median is that of tokens, and moves with who was drawn.

    100 samples of 60 requests; a coverage of 0.95 has an sd of 0.022, so four of them below is 0.86. The
    ranks of 60 independent values mapped onto the pooled ones cover 0.7 here.
    """
    rng = np.random.default_rng(5)

    def pooled(requests: int) -> tuple[np.ndarray, np.ndarray]:
        lengths = np.ceil(rng.lognormal(3, 1, requests)).astype(int)
        paces = 0.01 * lengths**0.5 * rng.lognormal(0, 0.3, requests)
        owners = np.repeat(np.arange(requests), lengths)
        return paces[owners] * rng.lognormal(0, 0.1, len(owners)), owners

    truth = float(np.median(pooled(100_000)[0]))
    covered = 0
    for _ in range(100):
        found = estimate_pooled(*pooled(60), {"p50": 0.5})["p50"]
        covered += found["low"] <= truth <= found["high"]
    assert covered >= 86


def test_a_pooled_interval_is_the_same_every_time() -> None:
    """The very numbers: a record must verify with any version of numpy."""
    values = np.arange(400.0) % 37
    owners = np.repeat(np.arange(40), 10)
    found = estimate_pooled(values, owners, {"p90": 0.9})["p90"]
    assert found == estimate_pooled(values[::-1], owners[::-1], {"p90": 0.9})["p90"]
    assert found == {"value": pytest.approx(32.1), "low": 29.0, "high": 34.0}


def test_a_hundred_thousand_gaps_take_about_a_second() -> None:
    values = np.random.default_rng(0).random(100_000)
    begin = time.perf_counter()
    estimate_pooled(values, np.repeat(np.arange(500), 200), {"p50": 0.5, "p99": 0.99})
    assert time.perf_counter() - begin < 5


def test_empty_sample_is_null() -> None:
    summary = summarise([])
    assert summary["count"] == 0
    assert summary["mean"] is None
    assert summary["p50"]["value"] is None


def test_wilsons_interval_is_the_textbooks() -> None:
    """15 of 20: Agresti & Coull's example gives (0.531, 0.888)."""
    assert wilson(15, 20) == pytest.approx((0.5313, 0.8881), abs=1e-4)
    assert wilson(0, 10)[0] == 0.0 and wilson(10, 10)[1] == 1.0
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.99])
def test_the_fewest_trials_are_just_enough(level: float) -> None:
    n = wilson_trials(level)
    assert wilson(n, n)[0] >= level > wilson(n - 1, n - 1)[0]
