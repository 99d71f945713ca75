"""Ticks are round and enclose the data; a place on an axis is the value's share of it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backbench.reports.page.axes import MOST_TICKS, fitting, linear, logarithmic, round_up, tick_text

positive = st.lists(st.floats(min_value=1e-6, max_value=1e9), min_size=1, max_size=20)


@given(st.lists(st.floats(min_value=-1e9, max_value=1e9), min_size=1, max_size=20), st.booleans())
def test_a_linear_axis_encloses_its_values_with_few_ticks(values: list[float], zero: bool) -> None:
    axis = linear("x (s)", values, zero)
    slack = 1e-6 * (axis.high - axis.low)
    assert axis.low <= min(values) + slack
    assert max(values) <= axis.high + slack
    assert 2 <= len(axis.ticks) <= MOST_TICKS
    assert (axis.low, axis.high) == (axis.ticks[0], axis.ticks[-1])
    if zero:
        assert axis.low <= 0


@given(positive)
def test_a_logarithmic_axis_encloses_its_values(values: list[float]) -> None:
    axis = logarithmic("x (s)", values)
    assert axis.low <= min(values) * (1 + 1e-12)
    assert max(values) <= axis.high
    assert all(f"{tick:e}"[0] in "125" for tick in axis.ticks)
    assert len(axis.ticks) <= 2 * MOST_TICKS
    assert axis.place([axis.low, axis.high]).tolist() == [0.0, 1.0]


def test_log_ticks_read_1_2_5_10_20() -> None:
    axis = logarithmic("TTFT (ms)", [1.2, 18.0])
    assert [tick_text(tick, axis) for tick in axis.ticks] == ["1", "2", "5", "10", "20"]
    assert axis.label == "TTFT (ms, log scale)"
    assert axis.unit == "ms"
    small = logarithmic("x (s)", [0.02, 0.4])
    assert [tick_text(tick, small) for tick in small.ticks] == ["0.02", "0.05", "0.1", "0.2", "0.5"]


def test_ticks_have_the_decimals_that_tell_them_apart() -> None:
    assert [tick_text(tick, axis) for axis in (linear("x (s)", [4]),) for tick in axis.ticks][:3] == [
        "0",
        "1",
        "2",
    ]
    fine = linear("x (s)", [0.3])
    assert tick_text(fine.ticks[1], fine) == "0.1"
    large = linear("x (s)", [5000])
    assert tick_text(large.ticks[-1], large) == "5,000"


def test_a_wide_range_is_logarithmic_and_zero_is_not() -> None:
    assert fitting("x (s)", [1, 21]).log
    assert not fitting("x (s)", [1, 20]).log
    assert not fitting("x (s)", [0, 1000]).log


@pytest.mark.parametrize(("value", "rounded"), [(1.0, 1), (1.1, 2), (3, 5), (5.1, 10), (0.03, 0.05)])
def test_round_up(value: float, rounded: float) -> None:
    assert round_up(value) == pytest.approx(rounded)


def test_places_are_linear_in_the_value_or_its_logarithm() -> None:
    axis = linear("x (s)", [0, 10])
    assert axis.place([0, 5, 10]).tolist() == [0, 0.5, 1]
    assert logarithmic("x (s)", [1, 100]).place(10) == pytest.approx(0.5)
    assert np.isnan(axis.place(float("nan")))
