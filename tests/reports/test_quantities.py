"""Numbers are shown in the unit that reads best, and never invented."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backbench.reports.quantities import (
    QUANTITIES,
    Reading,
    digits,
    format_interval,
    format_ratio,
    format_reading,
    format_value,
    quantity,
    read,
)
from backbench.reports.record import RunRecord


def record_with(**metrics: object) -> RunRecord:
    return RunRecord(run={"status": "complete"}, metrics=dict(metrics))


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.04567, "s", "45.7 ms"),
        (1.5, "s", "1.50 s"),
        (3.1e-8, "s", "31.0 ns"),
        (0.0, "s", "0 s"),
        (1234.5678, "tok/s", "1,235 tok/s"),
        (141 * 2**30, "bytes", "141 GiB"),
        (0.412, "ratio", "41.2%"),
        (0.21, "J/token", "210 mJ/token"),
        (None, "s", "—"),
        (math.inf, "s", "∞ s"),
    ],
)
def test_values_read_well(value: float | None, unit: str, text: str) -> None:
    assert format_value(value, unit) == text


def test_an_interval_uses_the_values_unit() -> None:
    assert format_reading(Reading(0.9, 0.5, 1.2), "s") == "900 ms (500–1,200)"


def test_an_infinite_upper_end_is_said() -> None:
    assert format_interval(Reading(0.5, 0.25, None), "s") == "250–∞"


@pytest.mark.parametrize(("value", "text"), [(1.118, "1.12×"), (0.0123, "0.0123×"), (25000.0, "25,000×")])
def test_ratios(value: float, text: str) -> None:
    assert format_ratio(value) == text


@given(st.floats(min_value=1e-3, max_value=1e12))
def test_digits_are_within_half_a_unit_of_the_third_digit(value: float) -> None:
    shown = float(digits(value).replace(",", ""))
    assert shown == pytest.approx(value, rel=5.001e-3)


def test_read_takes_plain_numbers_and_percentiles() -> None:
    record = record_with(
        requests_per_s=2.0, ttft_s={"mean": 0.5, "p50": {"value": 1.0, "low": 0.5, "high": 2.0}}
    )
    assert read(record, quantity("metrics", "requests_per_s")) == Reading(2.0)
    assert read(record, quantity("metrics", "ttft_s", "p50")) == Reading(1.0, 0.5, 2.0)
    assert read(record, quantity("metrics", "ttft_s", "mean")) == Reading(0.5)


def test_read_says_why_there_is_no_value() -> None:
    record = record_with(ttft_s={"p99": {"value": None, "unsupported": "needs 368 requests"}})
    assert read(record, quantity("metrics", "ttft_s", "p99")).reason == "needs 368 requests"
    assert read(record, quantity("metrics", "tpot_s", "p50")).reason == "not measured"


def test_read_prefers_the_measured_peak() -> None:
    record = RunRecord(run={"status": "complete"}, roofline={"mbu": {"measured": 0.5, "datasheet": 0.4}})
    assert read(record, quantity("roofline", "mbu")).value == 0.5


def test_paths_and_labels_are_unique() -> None:
    assert len({each.path for each in QUANTITIES}) == len(QUANTITIES)
    assert len({each.label for each in QUANTITIES}) == len(QUANTITIES)


def test_throughput_labels_say_which_tokens_and_which_stretch() -> None:
    for each in QUANTITIES:
        if each.unit == "tok/s":
            assert any(tokens in each.label for tokens in ("Output", "(input)", "Total (input + output)"))
            stretches = ("steady state", "whole run", "steps with prompts")
            assert any(stretch in each.label for stretch in stretches)
