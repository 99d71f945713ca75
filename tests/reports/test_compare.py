"""Who compares with whom, what differs, and ratios with their intervals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backbench.errors import ReportError
from backbench.reports.compare import (
    HARD_FIELDS,
    differences,
    incomparable,
    labels,
    ratio,
    ratio_table,
    require_comparable,
)
from backbench.reports.quantities import Reading
from backbench.reports.record import RunDirectory, RunRecord

Runs = list[RunDirectory]


@pytest.fixture
def records(gpu_runs: Runs) -> list[RunRecord]:
    return [run.read_record() for run in gpu_runs]


def test_same_workload_and_model_compare(records: list[RunRecord]) -> None:
    assert incomparable(records) == []
    require_comparable(records)


def changed(record: RunRecord, path: str, value: object) -> RunRecord:
    section, *keys = path.split(".")
    if not keys:
        return replace(record, **{section: value})
    outer = dict(getattr(record, section))
    inner = outer
    for key in keys[:-1]:
        inner[key] = dict(inner[key])
        inner = inner[key]
    inner[keys[-1]] = value
    return replace(record, **{section: outer})


@pytest.mark.parametrize(("path", "name"), HARD_FIELDS)
def test_every_hard_difference_is_named(records: list[RunRecord], path: str, name: str) -> None:
    other = changed(records[1], path, 987654)
    assert [each.field for each in incomparable([records[0], other])] == [name]
    with pytest.raises(ReportError) as error:
        require_comparable([records[0], other])
    assert name in str(error.value)
    assert "987654" in str(error.value)
    assert "\n" not in str(error.value)


def test_one_run_is_no_comparison(records: list[RunRecord]) -> None:
    with pytest.raises(ReportError, match="at least two"):
        require_comparable(records[:1])


def test_only_differing_fields_are_listed(records: list[RunRecord]) -> None:
    fields = {each.field: each.values for each in differences(records[:2])}
    assert fields["backend.used.attention"] == ("torch", "triton")
    assert "backend.used.linear" not in fields
    assert not any(field.startswith(("metrics", "run.uuid", "run.utc")) for field in fields)


def test_a_record_does_not_differ_from_itself(records: list[RunRecord]) -> None:
    assert differences([records[0], records[0]]) == []


def test_labels_are_distinct_and_short(records: list[RunRecord]) -> None:
    assert labels(records[:1]) == ["torch"]
    assert labels(records[:2]) == ["torch", "triton"]
    assert labels(records) == ["torch · NVIDIA H200", "triton · NVIDIA H200", "triton · AMD Instinct MI300X"]
    assert labels([records[0], records[0]]) == ["torch #1", "torch #2"]


def test_auto_is_labelled_with_what_ran(records: list[RunRecord]) -> None:
    assert labels([changed(records[1], "backend.asked", "auto")]) == ["triton"]


@pytest.mark.parametrize(
    ("reference", "candidate", "higher", "verdict"),
    [
        (Reading(1.0, 0.9, 1.1), Reading(2.0, 1.9, 2.1), True, "better"),
        (Reading(1.0, 0.9, 1.1), Reading(2.0, 1.9, 2.1), False, "worse"),
        (Reading(1.0, 0.9, 1.1), Reading(1.05, 1.0, 1.2), True, "same"),
        (Reading(1.0), Reading(1.5), True, "unclear"),
        (Reading(1.0), Reading(1.5), None, ""),
        (Reading(None), Reading(1.5), True, ""),
        (Reading(0.0), Reading(1.5), True, ""),
    ],
)
def test_verdicts(reference: Reading, candidate: Reading, higher: bool | None, verdict: str) -> None:
    assert ratio(reference, candidate, higher).verdict == verdict


positive = st.floats(min_value=1e-6, max_value=1e6)


@given(
    st.tuples(positive, positive, positive).map(sorted), st.tuples(positive, positive, positive).map(sorted)
)
def test_a_ratios_interval_holds_it(a: list[float], b: list[float]) -> None:
    found = ratio(Reading(a[1], a[0], a[2]), Reading(b[1], b[0], b[2]), True)
    assert found.value is not None and found.low is not None and found.high is not None
    assert found.low <= found.value * (1 + 1e-12)
    assert found.value <= found.high * (1 + 1e-12)


def test_ratio_table_knows_the_orientation(records: list[RunRecord]) -> None:
    table = ratio_table(records[:2]).set_index("metric")
    assert table.loc["Output tok/s, steady state", "better"] == "higher"
    assert table.loc["TPOT p50", "better"] == "lower"
    expected = records[1].metrics["tpot_s"]["p50"]["value"] / records[0].metrics["tpot_s"]["p50"]["value"]
    assert table.loc["TPOT p50", "triton / torch"] == pytest.approx(expected)
    assert table.loc["TPOT p50", "torch"] == records[0].metrics["tpot_s"]["p50"]["value"]


def test_a_faster_backend_shows_as_faster(make_run: Callable[..., RunDirectory]) -> None:
    slow, fast = (make_run("NVIDIA", name).read_record() for name in ("torch", "triton"))
    table = ratio_table([slow, fast]).set_index("metric")
    assert table.loc["TPOT p50", "triton / torch"] < 0.95
