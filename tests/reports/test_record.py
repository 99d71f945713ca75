"""The record survives the disk unchanged, and damage is named in one line."""

from __future__ import annotations

import cProfile
import json
import pstats
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backbench.errors import ReportError
from backbench.reports.record import (
    REQUEST_COLUMNS,
    STEP_COLUMNS,
    TELEMETRY_COLUMNS,
    RunDirectory,
    RunRecord,
    digest_problems,
    finite,
)
from backbench.reports.record.digests import record_digest
from backbench.reports.record.schema import LATER_COLUMNS


def minimal_record() -> RunRecord:
    return RunRecord(run={"uuid": "u", "utc": "t", "command": "bench run", "seed": 1, "status": "complete"})


ALONE = (None, None, None, None)
"""Turn, followed request and think time of one that belongs to no session."""


def request_frame() -> pd.DataFrame:
    rows = [
        (
            0,
            None,
            0,
            10,
            2**55 + 1,
            2**55 + 3,
            7,
            3,
            3,
            [2**55 + 1, 2**55 + 3],
            [1, 2],
            True,
            None,
            False,
            *ALONE,
        ),
        (1, "a", 5, None, None, None, 7, 3, 0, [], [], False, "never sent", False, *ALONE),
        (2, "a", 6, 8, 9, 11, 7, 3, 2, [9, 11], [1, None], True, None, False, *ALONE[:3], 4),
    ]
    return pd.DataFrame(rows, columns=list(REQUEST_COLUMNS), dtype=object)


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "run")


def one_line(error: pytest.ExceptionInfo[ReportError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_record_round_trip(directory: RunDirectory) -> None:
    record = replace(minimal_record(), metrics={"ttft_s": {"p50": {"value": 0.25}}}, validity=["throttled"])
    directory.write_record(record)
    assert directory.read_record() == record


def test_infinities_and_numpy_become_plain_json(directory: RunDirectory) -> None:
    metrics = {"a": float("inf"), "b": np.float64("nan"), "c": np.int64(3), "d": (1, -float("inf"))}
    directory.write_record(replace(minimal_record(), metrics=metrics))
    assert directory.read_record().metrics == {"a": None, "b": None, "c": 3, "d": [1, None]}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=10,
)


@given(json_values)
def test_finite_is_strict_json(value: object) -> None:
    cleaned = finite(value)
    assert json.loads(json.dumps(cleaned, allow_nan=False)) == cleaned


def test_same_record_same_bytes_whatever_the_key_order(directory: RunDirectory) -> None:
    a = replace(minimal_record(), engine={"x": 1, "y": 2})
    b = replace(minimal_record(), engine={"y": 2, "x": 1})
    assert a.to_json() == b.to_json()


def test_tables_round_trip_without_rounding(directory: RunDirectory) -> None:
    directory.write_requests(request_frame())
    frame = directory.read_requests()
    assert list(frame.columns) == list(REQUEST_COLUMNS)
    assert frame["first_ns"][0] == 2**55 + 1
    assert frame["first_ns"].isna().tolist() == [False, True, False]
    assert list(frame["token_ns"][0]) == [2**55 + 1, 2**55 + 3]
    assert frame["token_counts"][2][0] == 1
    assert np.isnan(frame["token_counts"][2][1])
    assert frame["error"][1] == "never sent"
    assert frame["finished"].tolist() == [True, False, True]
    assert frame["usage_tokens"][2] == 4


def test_a_table_of_before_there_were_sessions_reads_as_one_without(directory: RunDirectory) -> None:
    directory.write_requests(request_frame())
    file = directory.path / "requests.parquet"
    table = pyarrow.parquet.read_table(file)
    pyarrow.parquet.write_table(
        table.drop_columns([name for name in LATER_COLUMNS if name in REQUEST_COLUMNS]), file
    )
    frame = directory.read_requests()
    assert list(frame.columns) == list(REQUEST_COLUMNS)
    assert frame[[name for name in LATER_COLUMNS if name in REQUEST_COLUMNS]].isna().all().all()
    pyarrow.parquet.write_table(table.drop_columns(["turn", "error"]), file)
    with pytest.raises(ReportError, match="other columns than its schema: error"):
        directory.read_requests()


def test_empty_tables_round_trip(directory: RunDirectory) -> None:
    directory.write_steps(pd.DataFrame(columns=list(STEP_COLUMNS)))
    directory.write_telemetry(pd.DataFrame(columns=list(TELEMETRY_COLUMNS)))
    assert len(directory.read_steps()) == 0
    assert list(directory.read_telemetry().columns) == list(TELEMETRY_COLUMNS)


def test_a_missing_required_value_is_refused(directory: RunDirectory) -> None:
    with pytest.raises(ReportError) as error:
        directory.write_requests(request_frame().drop(columns="intended_ns"))
    assert "intended_ns" in one_line(error)
    frame = request_frame()
    frame.loc[0, "intended_ns"] = None
    with pytest.raises(ReportError) as error:
        directory.write_requests(frame)
    assert "intended_ns" in one_line(error)


@pytest.mark.parametrize("name", ["run.json", "requests.parquet", "steps.parquet", "telemetry.parquet"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_damaged_files_are_named(directory: RunDirectory, name: str, damage: str) -> None:
    directory.write_record(minimal_record())
    directory.write_requests(request_frame())
    directory.write_steps(pd.DataFrame(columns=list(STEP_COLUMNS)))
    directory.write_telemetry(pd.DataFrame(columns=list(TELEMETRY_COLUMNS)))
    file = directory.path / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    read = {
        "run.json": directory.read_record,
        "requests.parquet": directory.read_requests,
        "steps.parquet": directory.read_steps,
        "telemetry.parquet": directory.read_telemetry,
    }[name]
    with pytest.raises(ReportError) as error:
        read()
    assert str(file) in one_line(error)


def test_other_schema_versions_are_refused(directory: RunDirectory) -> None:
    directory.write_record(replace(minimal_record(), schema_version=99))
    with pytest.raises(ReportError) as error:
        directory.read_record()
    assert "schema_version 99" in one_line(error)


def test_a_record_without_a_section_is_refused(directory: RunDirectory) -> None:
    data = json.loads(minimal_record().to_json())
    del data["metrics"]
    with pytest.raises(ReportError, match="lacks the section 'metrics'"):
        RunRecord.from_json(json.dumps(data), "run.json")


def test_unknown_status_is_refused() -> None:
    with pytest.raises(ReportError, match=r"run\.status"):
        RunRecord(run={"status": "done"})


def test_create_refuses_what_it_would_overwrite(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    with pytest.raises(ReportError) as error:
        RunDirectory.create(tmp_path / "full")
    assert "not empty" in one_line(error)
    with pytest.raises(ReportError) as error:
        RunDirectory.create(tmp_path / "full" / "file")
    assert "not a directory" in one_line(error)
    with pytest.raises(ReportError) as error:
        RunDirectory.create(tmp_path / "full" / "file" / "below")
    assert "Cannot create" in one_line(error)


def test_open_takes_the_directory_or_its_record(directory: RunDirectory, tmp_path: Path) -> None:
    directory.write_record(minimal_record())
    assert RunDirectory.open(directory.path / "run.json") == directory
    with pytest.raises(ReportError, match="no run directory"):
        RunDirectory.open(tmp_path / "nowhere")


def test_no_temporary_file_is_left(directory: RunDirectory) -> None:
    directory.write_record(minimal_record())
    assert [path.name for path in directory.path.iterdir()] == ["run.json"]


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.floats().map(np.float64)
trees = st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)


@given(st.dictionaries(st.text(), trees))
def test_what_was_written_and_what_is_read_have_one_digest(engine: dict[str, Any]) -> None:
    record = replace(minimal_record(), engine=engine)
    read = json.loads(record.to_json())
    assert record_digest(replace(record, engine=read["engine"])) == record_digest(record)


def values_in(tree: object) -> int:
    if isinstance(tree, dict):
        return sum(map(values_in, tree.values()))
    return sum(map(values_in, tree)) if isinstance(tree, list) else 1


def test_reading_a_record_costs_a_few_calls_a_value(cpu_run: RunDirectory) -> None:
    """About 21 a value, checks and digest included, of which 1,000 records take some two seconds."""
    values = values_in(json.loads((cpu_run.path / "run.json").read_text()))
    profile = cProfile.Profile()
    with profile:
        assert not list(digest_problems(cpu_run, cpu_run.read_record()))
    calls = pstats.Stats(profile).total_calls  # type: ignore[attr-defined]
    assert calls <= 40 * values
