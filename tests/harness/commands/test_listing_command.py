"""`bench list`, and `latest` wherever a run is asked for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from backbench.harness.cli import run_command

OLD = Path(__file__).parents[2] / "reports" / "fixtures" / "schema-1"


def bench(*arguments: object) -> int:
    """The exit code of a command, however it ends."""
    try:
        return run_command([*map(str, arguments)])
    except SystemExit as end:
        return int(end.code or 0)


def edit(run: Path, **about: Any) -> None:
    file = run / "run.json"
    data = json.loads(file.read_text())
    data["run"] |= about
    file.write_text(json.dumps(data))


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs, the sdpa one later and labelled, in runs/ of the working directory."""
    for name, about in (
        ("torch", {"utc": "2026-01-01T00:00:00+00:00"}),
        ("sdpa", {"utc": "2026-01-02T00:00:00+00:00", "label": "night", "tags": {"card": "left"}}),
    ):
        edit(shutil.copytree(OLD / name, tmp_path / "runs" / name), **about)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def test_the_list_names_what_can_be_read_and_what_not(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "broken").mkdir()
    (runs / "broken" / "run.json").write_text("{")
    assert bench("list") == 0
    told = capsys.readouterr()
    torch, sdpa = (line for line in told.out.splitlines() if "2026-01-0" in line)
    assert torch.split()[-1] == "runs/torch" and sdpa.split()[-1] == "runs/sdpa"
    assert "night card=left" in sdpa
    assert told.err.startswith("not readable: runs/broken: ")
    assert bench("list", "runs", "--json") == 0
    broken, torch, sdpa = json.loads(capsys.readouterr().out)
    assert broken["problem"] and torch["problem"] is None
    assert sdpa["tags"] == {"card": "left"} and sdpa["output_tokens_per_s"] > 0


def test_a_strangers_names_do_not_fill_the_screen(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(runs / "torch", label="x" * 10_000)
    assert bench("list") == 0
    assert len(capsys.readouterr().out) < 4000


def test_no_runs_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("list", tmp_path) == 0
    assert capsys.readouterr().err == f"There are no runs below {tmp_path}.\n"
    assert bench("list", tmp_path / "none") == 2
    assert capsys.readouterr().err.startswith("error: There is no directory")


def test_latest_is_taken_and_said(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["show", "latest"],
        ["verify", "latest"],
        ["compare", "latest", "runs/torch"],
        ["report", "latest", "-o", "page.html"],
    ):
        bench(*arguments)
        assert capsys.readouterr().err.startswith("latest: runs/sdpa\n"), arguments
    bench("show", "latest:night")
    told = capsys.readouterr()
    assert told.err.startswith("latest:night: runs/sdpa\n")
    assert told.out.startswith("night card=left: ")
    assert bench("show", "latest:day") == 2
    assert "no finished run labelled 'day'" in capsys.readouterr().err


def test_a_folder_of_that_name_wins(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(runs / "torch", Path("latest"))
    assert bench("show", "latest") == 0
    assert "runs/sdpa" not in capsys.readouterr().err


def test_a_labelled_run_is_compared_under_its_label(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(runs / "torch", label="day")
    assert bench("compare", "runs/torch", "latest:night", "--json", "--anyway") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["runs"] == ["day", "night"]
    assert found["differences"]["run.tags.card"] == [None, "left"]
