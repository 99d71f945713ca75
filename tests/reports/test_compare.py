"""Who compares with whom, what differs, and ratios with their intervals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backbench.errors import ReportError
from backbench.reports.arms import arms_of, require_comparable
from backbench.reports.compare import (
    HARD_FIELDS,
    differences,
    incomparable,
    labels,
)
from backbench.reports.ratios import ratio_table
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


def test_hashes_and_durations_are_no_differences_of_their_own(records: list[RunRecord]) -> None:
    """Another backend has other sources; sources that differ under one backend do count, and are short."""
    hashes = {"attention": "a" * 63 + "1", "linear": "c" * 64}
    torch = changed(records[0], "backend.kernel_source_hash", hashes)
    triton = changed(records[1], "backend.kernel_source_hash", {"attention": "b" * 64, "linear": "d" * 64})
    triton = changed(triton, "warmup.seconds", 0.054075936999652185)
    fields = {each.field: each for each in differences([torch, triton])}
    assert "backend.kernel_source_hash.linear" in fields
    assert "backend.kernel_source_hash.attention" not in fields and "warmup.seconds" not in fields
    assert str(fields["backend.kernel_source_hash.linear"]).endswith(": cccccccccccc vs dddddddddddd")


def test_labels_are_distinct_and_short(records: list[RunRecord]) -> None:
    assert labels(records[:1]) == ["torch"]
    assert labels(records[:2]) == ["torch", "triton"]
    assert labels(records) == ["torch · NVIDIA H200", "triton · NVIDIA H200", "triton · AMD Instinct MI300X"]
    assert labels([records[0], records[0]]) == ["torch · run 1", "torch · run 2"]


def test_auto_is_labelled_with_what_ran(records: list[RunRecord]) -> None:
    assert labels([changed(records[1], "backend.asked", "auto")]) == ["triton"]


def asked(record: RunRecord, **options: object) -> RunRecord:
    return changed(record, "run.asked", options)


def test_options_that_differ_are_the_label_and_nothing_else(records: list[RunRecord]) -> None:
    torch, triton, _ = records
    runs = [asked(torch, max_seqs=64, workload="tiny"), asked(torch, workload="tiny", graphs=False)]
    assert labels(runs) == ["max_seqs 64 · default graphs", "default max_seqs · no graphs"]
    assert labels([asked(torch), asked(torch, graphs=False)]) == ["default graphs", "no graphs"]
    runs = [asked(torch, rate=2), asked(triton, rate=4)]
    assert labels(runs) == ["torch · rate 2", "triton · rate 4"], "the backend does not get the credit"
    runs = [asked(torch, rate=2), asked(torch, rate=4), asked(triton, rate=2)]
    assert labels(runs) == ["torch · rate 2", "torch · rate 4", "triton · rate 2"]


def test_quantized_weights_are_named_once(records: list[RunRecord]) -> None:
    plain = asked(records[0])
    quantized = changed(asked(records[0], quantize="int8"), "model.quantization", "int8")
    assert labels([plain, quantized]) == ["not quantized", "int8"]


def test_runs_of_one_configuration_are_told_apart_by_time_and_label(records: list[RunRecord]) -> None:
    run = records[0]
    later = changed(run, "run.utc", "2025-02-03T00:00:00Z")
    assert labels([run, later]) == ["torch · 2025-01-02T03:04:05Z", "torch · 2025-02-03T00:00:00Z"]
    before, after = changed(run, "run.label", "before"), changed(later, "run.label", "after")
    assert labels([before, after]) == ["before", "after"]
    assert labels([asked(before, rate=2), asked(after, rate=4)]) == ["before", "after"], "their user's names"
    assert labels([before, later]) == ["before", "torch"]
    both = [
        before,
        changed(records[1], "run.label", "before"),
        after,
        changed(records[1], "run.label", "after"),
    ]
    assert labels(both) == ["before · torch", "before · triton", "after · torch", "after · triton"]


@given(st.lists(st.tuples(st.text(max_size=3), st.sampled_from("ab"), st.booleans()), min_size=1))
def test_labels_are_distinct_whatever_was_asked(runs: list[tuple[str, str, bool]]) -> None:
    asked = [
        RunRecord(
            run={"status": "complete", "label": label, "asked": {"graphs": graphs}}, backend={"asked": name}
        )
        for label, name, graphs in runs
    ]
    found = labels(asked)
    assert len(set(found)) == len(found) and all(found)


def test_a_label_cannot_take_the_number_of_another(records: list[RunRecord]) -> None:
    run = records[0]
    assert len(set(labels([run, run, changed(run, "run.label", "torch · run 1")]))) == 3


def test_tags_are_among_the_differences(records: list[RunRecord]) -> None:
    tagged = changed(records[0], "run.tags", {"commit": "a1"})
    (found,) = differences([records[0], tagged])
    assert (found.field, found.values) == ("run.tags.commit", (None, "a1"))
    assert incomparable([records[0], tagged]) == []


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
