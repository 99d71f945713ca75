"""Who compares with whom, what differs, and ratios with their intervals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from backbench.errors import ReportError
from backbench.reports.arms import arms_of, ratio_table, require_comparable
from backbench.reports.compare import (
    HARD_FIELDS,
    differences,
    incomparable,
    labels,
)
from backbench.reports.record import RunDirectory, RunRecord

Runs = list[RunDirectory]


@pytest.fixture
def records(gpu_runs: Runs) -> list[RunRecord]:
    return [run.read_record() for run in gpu_runs]


def test_same_workload_and_model_compare(records: list[RunRecord]) -> None:
    assert incomparable(records) == []
    require_comparable(arms_of(records))


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
        require_comparable(arms_of([records[0], other]))
    assert name in str(error.value)
    assert "987654" in str(error.value)
    assert "\n" not in str(error.value)


def test_one_run_is_no_comparison(records: list[RunRecord]) -> None:
    with pytest.raises(ReportError, match="at least two"):
        require_comparable(arms_of(records[:1]))


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
    assert labels([records[0], records[0]]) == ["torch · run 1", "torch · run 2"]


def test_auto_is_labelled_with_what_ran(records: list[RunRecord]) -> None:
    assert labels([changed(records[1], "backend.asked", "auto")]) == ["triton"]


def test_options_that_differ_are_the_label(records: list[RunRecord]) -> None:
    asked = ({"max_seqs": 64, "workload": "tiny"}, {"workload": "tiny", "graphs": False})
    runs = [changed(records[0], "run.asked", each) for each in asked]
    assert labels(runs) == ["torch · max_seqs 64", "torch · default max_seqs"]
    runs = [changed(records[0], "run.asked", each) for each in ({}, {"graphs": False})]
    assert labels(runs) == ["torch · default graphs", "torch · no graphs"]


def test_ratio_table_knows_the_orientation(records: list[RunRecord]) -> None:
    table = ratio_table(arms_of(records[:2])).set_index("metric")
    assert table.loc["Output tok/s, steady state", "better"] == "higher"
    assert table.loc["TPOT p50", "better"] == "lower"
    expected = records[1].metrics["tpot_s"]["p50"]["value"] / records[0].metrics["tpot_s"]["p50"]["value"]
    assert table.loc["TPOT p50", "triton / torch"] == pytest.approx(expected)
    assert table.loc["TPOT p50", "torch"] == records[0].metrics["tpot_s"]["p50"]["value"]


def test_a_faster_backend_shows_as_faster(make_run: Callable[..., RunDirectory]) -> None:
    slow, fast = (make_run("NVIDIA", name).read_record() for name in ("torch", "triton"))
    table = ratio_table(arms_of([slow, fast])).set_index("metric")
    assert table.loc["TPOT p50", "triton / torch"] < 0.95
