"""Change points: their false alarms, and the changes they find."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backbench.reports.metrics.change_points import ALARM, FEWEST, change_points


@pytest.mark.parametrize("noise", ["normal", "heavy", "ties"])
@pytest.mark.parametrize("days", [12, 40])
def test_a_series_without_a_change_is_split_as_often_as_is_said(noise: str, days: int) -> None:
    """1 % of 1,000 series, up to 3 standard errors (0.31 %) more."""
    rng = np.random.default_rng(days)
    draw = {
        "normal": lambda: rng.normal(0, 0.03, days),
        "heavy": lambda: rng.standard_t(2, days),
        "ties": lambda: rng.integers(0, 4, days).astype(float),
    }[noise]
    alarms = sum(bool(change_points(draw())) for _ in range(1000))
    assert alarms <= 1000 * (0.01 + 3 * (0.01 * 0.99 / 1000) ** 0.5)


def test_false_alarms_are_not_rarer_than_they_need_be() -> None:
    """A test that never alarms would pass the one above."""
    rng = np.random.default_rng(1)
    assert sum(bool(change_points(rng.normal(0, 1, 40))) for _ in range(1000)) >= 2


def test_a_loss_of_five_percent_is_found_where_it_is() -> None:
    """Forty days with 2 % of noise, a loss after the 25th: found in 95 of 100 within two days."""
    rng = np.random.default_rng(3)
    near = 0
    for _ in range(100):
        series = 400 * np.exp(rng.normal(0, 0.02, 40))
        series[25:] *= 0.95
        near += any(abs(change.index - 25) <= 2 for change in change_points(series))
    assert near >= 95


def test_two_changes_have_their_levels() -> None:
    rng = np.random.default_rng(4)
    series = np.concatenate([np.full(15, 100.0), np.full(15, 80.0), np.full(15, 120.0)])
    found = change_points(series + rng.normal(0, 1, 45))
    assert [change.index for change in found] == [15, 30]
    assert found[0].before == pytest.approx(100, abs=1) and found[0].after == pytest.approx(80, abs=1)
    assert found[1].before == found[0].after and found[1].after == pytest.approx(120, abs=1)
    assert all(change.p <= ALARM for change in found)


def test_one_odd_day_is_no_change() -> None:
    series = list(np.random.default_rng(5).normal(100, 1, 30))
    series[12] = 10.0
    assert change_points(series) == []


@given(st.lists(st.floats(-1e6, 1e6), max_size=30))
def test_any_series_has_its_changes_in_order(values: list[float]) -> None:
    found = change_points(values)
    places = [change.index for change in found]
    assert all(change.p <= ALARM for change in found)
    assert places == sorted(set(places)) and all(0 < place < len(values) for place in places)
    assert not found or len(values) >= FEWEST
