"""`show`, `compare`, `report` and `verify` of records that were edited, are foreign, or are none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backbench.harness.cli import run_command

OLD = Path(__file__).parents[2] / "reports" / "fixtures" / "schema-1"
Edit = Callable[[dict[str, Any]], None]


def commands(run: Path, out: Path) -> list[list[str]]:
    return [
        ["show", str(run)],
        ["compare", str(run), str(OLD / "sdpa"), "--anyway"],
        ["report", str(run), "-o", str(out)],
        ["verify", str(run)],
    ]


def bench(*arguments: str) -> int:
    """The exit code of a command, however it ends."""
    try:
        return run_command(list(arguments))
    except SystemExit as end:
        return int(end.code or 0)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return shutil.copytree(OLD / "torch", tmp_path / "run")


def put(data: Any, path: str, value: Any) -> None:
    *parents, leaf = path.split(".")
    for key in parents:
        data = data[key]
    data[leaf] = value


def refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command says what is wrong in one printable line."""
    for arguments in commands(run, run.parent / "report.html"):
        capsys.readouterr()
        code = bench(*arguments)
        told = capsys.readouterr()
        assert code in (2, 4), arguments
        assert told.out == ""
        (line,) = told.err.splitlines()
        assert line.startswith("error: ")
        assert len(line) < 300
        assert line.isprintable()
        assert "run.json" in line


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("metrics.ttft_s.p50.value", "fast"),
        ("metrics.ttft_s", "fast"),
        ("metrics.counts", [1]),
        ("metrics.counts.failed", "none"),
        ("system.device", "x"),
        ("backend.used", [1]),
        ("backend.tuned", ["x"]),
        ("backend.passed_over", "x"),
        ("metrics.context.peaks", None),
        ("metrics.context.slo_s", [1]),
        ("metrics.context.end_ns", "late"),
        ("memory.total_bytes", "all"),
        ("roofline.decode_fit", 3),
        ("workload.name", "a\ud800b"),
        ("workload.name", "\x1b[31mred"),
        ("run.command", {"a": 1}),
        ("validity", [1]),
        ("energy.reasons", "none"),
        ("correctness.passed", "yes"),
        ("metrics.ttft_s.p50.low", True),
    ],
)
def test_a_record_of_other_types_is_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], path: str, value: Any
) -> None:
    file = run / "run.json"
    data = json.loads(file.read_text())
    put(data, path, value)
    file.write_text(json.dumps(data))
    refused(run, capsys)


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        '{"a":' * 50_000,
        "null",
        "[]",
        "{}",
        "",
        '{"schema_version": NaN}',
        '{"schema_version": true}',
        '{"schema_version": 1e999}',
        '{"schema_version": 1' + "0" * 5000 + "}",
    ],
)
def test_what_is_no_record_is_one_line(run: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    (run / "run.json").write_text(content)
    refused(run, capsys)


def test_deep_nesting_inside_a_section_is_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run / "run.json"
    data = json.loads(file.read_text())
    deep: Any = 1
    for _ in range(500):
        deep = {"a": deep}
    data["engine"]["deep"] = deep
    file.write_text(json.dumps(data))
    refused(run, capsys)


def test_a_number_that_json_has_not_is_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run / "run.json"
    file.write_text(file.read_text().replace('"seed": 0', '"seed": NaN'))
    refused(run, capsys)


def test_bytes_that_are_no_text_are_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "run.json").write_bytes(b'{"a": "\xff\xfe"}')
    refused(run, capsys)


def test_an_edited_record_is_shown_and_said_to_be_edited(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = run / "run.json"
    data = json.loads(file.read_text())
    data["metrics"]["output_tokens_per_s"]["whole_run"] = 9999.0
    file.write_text(json.dumps(data))
    *reading, verify = commands(run, run.parent / "report.html")
    for arguments in reading:
        capsys.readouterr()
        assert bench(*arguments) == 0
        told = capsys.readouterr().err
        assert f"tampered: {run}: run.json was edited after the run (its digest differs)" in told
    page = (run.parent / "report.html").read_text()
    assert "Not as it was written: run.json was edited after the run" in page
    capsys.readouterr()
    assert bench(*verify) == 4
    assert "metrics.output_tokens_per_s.whole_run is 9999.0" in capsys.readouterr().err


def test_an_untouched_record_is_not_accused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in commands(run, run.parent / "report.html"):
        assert bench(*arguments) == 0
    assert "tampered" not in capsys.readouterr().err


def test_a_directorys_name_cannot_steer_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "a\x1b[31mb"
    shutil.copytree(OLD / "torch", run)
    (run / "steps.parquet").unlink()
    for arguments in commands(run, tmp_path / "report.html"):
        bench(*arguments)
        told = capsys.readouterr()
        assert "\x1b[31m" not in told.out + told.err
