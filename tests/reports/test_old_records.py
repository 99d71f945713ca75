"""Runs written before metric schema 2 still verify, show, compare and have a page.

The two runs under fixtures/schema-1 were measured and written by the last version with metric schema 1.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from backbench.harness.cli import run_command
from backbench.reports.record import RunDirectory
from backbench.reports.verify import examine

OLD = Path(__file__).parent / "fixtures" / "schema-1"
RUNS = [str(OLD / "torch"), str(OLD / "sdpa")]


def bench(*arguments: str) -> int:
    """The exit code of a command, however it ends."""
    try:
        return run_command(list(arguments))
    except SystemExit as end:
        return int(end.code or 0)


@pytest.mark.parametrize("run", RUNS)
def test_an_old_run_verifies_and_says_what_was_not_recomputed(
    run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("verify", run) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = [each for each in lines if "of an older definition" in each]
    assert "metric schema 1" in line
    for name in ("roofline.decode_fit", "metrics.itl_s (low, high)", "metrics.steps.host_share"):
        assert name in line


def test_an_old_runs_other_numbers_are_still_checked(tmp_path: Path) -> None:
    path = shutil.copytree(OLD / "torch", tmp_path / "run") / "run.json"
    data = json.loads(path.read_text())
    data["metrics"]["ttft_s"]["p50"]["value"] = 0.001
    data["metrics"]["itl_s"]["p50"]["value"] = 0.001
    path.write_text(json.dumps(data))
    problems = examine(RunDirectory(path.parent)).problems
    assert any(each.startswith("metrics.ttft_s.p50.value is 0.001") for each in problems)
    assert any(each.startswith("metrics.itl_s.p50.value is 0.001") for each in problems)


def test_an_old_run_shows(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("show", RUNS[0]) == 0
    shown = capsys.readouterr()
    assert "529 tok/s" in shown.out
    assert shown.err == ""


def test_two_old_runs_compare_and_have_a_page(tmp_path: Path) -> None:
    assert bench("compare", *RUNS) == 0
    assert bench("report", *RUNS, "-o", str(tmp_path / "report.html")) == 0


def test_records_of_two_metric_schemas_do_not_compare(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shutil.copytree(OLD / "torch", tmp_path / "run") / "run.json"
    data = json.loads(path.read_text())
    data["metrics"]["schema"] = 2
    path.write_text(json.dumps(data))
    assert bench("compare", str(path.parent), RUNS[1]) == 4
    assert "metric schema: 2 vs 1" in capsys.readouterr().err
