"""The sign flip against scipy's permutation test, and intervals that cover as often as they say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from backbench.reports.metrics import between_runs as between

# Whole 64ths: sums of them are exact, so that ties are ties in both computations.
differences = st.lists(st.integers(-64, 64), min_size=2, max_size=9).map(lambda each: np.array(each) / 64)


@given(differences)
def test_p_values_are_scipys(values: np.ndarray) -> None:
    exact = stats.permutation_test(
        (values,), np.mean, permutation_type="samples", alternative="greater", n_resamples=np.inf
    )
    assert between.sign_flip_p(values) == pytest.approx(exact.pvalue)


@pytest.mark.parametrize("n", [8, 12])
def test_p_values_at_a_gates_looks_are_scipys(n: int) -> None:
    values = np.random.default_rng(n).normal(0.3, 1, n)
    exact = stats.permutation_test(
        (values,), np.mean, permutation_type="samples", alternative="greater", n_resamples=np.inf
    )
    assert between.sign_flip_p(values) == pytest.approx(exact.pvalue)


@given(differences)
def test_the_interval_is_the_test_inverted(values: np.ndarray) -> None:
    interval = between.sign_flip_interval(values, confidence=0.5)
    if interval is None:
        assert len(values) < 3
        return
    low, high = interval
    width = max(1e-3, high - low)
    for shift, inside in ((low - 1e-3 * width, False), (low + 1e-3 * width, low < high)):
        if inside or shift < low:
            assert (between.sign_flip_p(values - shift) > 0.25) == inside or low == high


@given(differences)
def test_p_and_interval_at_one_go_are_the_same(values: np.ndarray) -> None:
    assert between.sign_flip(values) == (between.sign_flip_p(values), between.sign_flip_interval(values))


def test_hodges_lehmann_by_hand() -> None:
    # Walsh averages of 0, 1, 10: 0, 0.5, 5, 1, 5.5, 10; their median lies between 1 and 5.
    assert between.hodges_lehmann(np.array([0.0, 1.0, 10.0])) == 3.0


@given(differences)
def test_hodges_lehmann_is_the_median_of_all_averages_of_two(values: np.ndarray) -> None:
    averages = [(a + b) / 2 for place, a in enumerate(values) for b in values[place:]]
    assert between.hodges_lehmann(values) == np.median(averages)


@given(differences, st.integers(-64, 64).map(lambda each: each / 64))
def test_a_shift_shifts_the_estimate_and_its_interval(values: np.ndarray, shift: float) -> None:
    """So that what holds of identical arms holds of arms that differ by any ratio."""
    before, after = between.difference(values), between.difference(values + shift)
    assert before.low is not None and before.high is not None
    assert (after.value, after.low, after.high) == pytest.approx(
        (before.value + shift, before.low + shift, before.high + shift)
    )
    assert before.low <= before.value <= before.high


def test_holm_by_hand() -> None:
    assert between.holm(np.array([0.04, 0.01, 0.03])) == pytest.approx([0.06, 0.03, 0.06])


def test_one_run_has_no_interval() -> None:
    assert between.typical(np.array([5.0])) == between.Estimate(pytest.approx(5.0), None, None, 1)


def test_fewer_than_six_pairs_take_students_interval() -> None:
    pairs = np.array([0.01, 0.02, 0.03])
    found = between.difference(pairs)
    low, high = stats.t.interval(0.95, 2, pairs.mean(), stats.sem(pairs))
    assert (found.low, found.high) == pytest.approx((low, high))


@pytest.mark.parametrize("n", [3, 5, 8, 16])
def test_intervals_between_runs_cover_as_often_as_they_say(n: int) -> None:
    """3,000 trials have a standard error of 0.4 %; the sign flip's interval may cover more, never less."""
    rng = np.random.default_rng(n)
    runs, pairs = 0, 0
    for _ in range(3000):
        noise = rng.normal(0, 0.02, n)
        arm, difference = between.typical(100 * np.exp(noise)), between.difference(noise)
        assert arm.low and arm.high and difference.low is not None and difference.high is not None
        runs += arm.low <= 100 <= arm.high
        pairs += difference.low <= 0 <= difference.high
    assert 0.938 <= runs / 3000 <= 0.962
    assert 0.938 <= pairs / 3000 <= 0.975
