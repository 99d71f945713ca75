"""`bench sweep` as it is typed: what it refuses, says before, runs, survives, and leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import backbench
from backbench.errors import INTERRUPTED
from backbench.harness.cli import run_command
from backbench.harness.sweep.lease import FAILED, leases
from backbench.reports.record.sweep import read_sweep

CAMPAIGN = """
[base]
workload = "batch:2x8+4"
device = "cpu"
warmup = 1
max-len = 64
[matrix]
backend = ["torch", "flash", "sdpa"]
"""


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "backbench", "sweep", "night.toml", *options],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(backbench.__file__).parents[1])},
    )


def until_measuring(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Wait for the run of the first cell; the worker and the run."""
    end = time.monotonic() + 100
    while len(found := psutil.Process(process.pid).children(recursive=True)) < 2:
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
    return found


@pytest.fixture(scope="module")
def killed_and_resumed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bool], int, str, str]:
    """A sweep killed in its first run and started again: its directory, which processes outlived the kill,
    and how the second one ended and what it said."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "night.toml").write_text(CAMPAIGN)
    first = start(folder)
    below = until_measuring(first)
    first.kill()
    first.communicate()
    _, alive = psutil.wait_procs(below, timeout=10)
    second = start(folder)
    out, err = second.communicate(timeout=200)
    return folder / "runs" / "night", [each in alive for each in below], second.returncode, out, err


@pytest.mark.slow
def test_nothing_outlives_a_killed_sweep(killed_and_resumed: tuple[Path, list[bool], int, str, str]) -> None:
    assert killed_and_resumed[1] == [False, False]


@pytest.mark.slow
def test_a_failed_point_is_told_and_the_rest_is_there(
    killed_and_resumed: tuple[Path, list[bool], int, str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    path, _, code, out, err = killed_and_resumed
    assert code == 4
    assert "failed: flash, run 1: " in err and "Traceback" not in err
    assert "night: 2 of 3 runs done, 1 failed." in out
    assert (path / "report.html").is_file()
    sweep = read_sweep(path)
    assert [each.how for each in leases(sweep.directory(sweep.cells[1]))] == [FAILED, FAILED]
    assert not list(path.rglob("owner.json")) or "broken" in str(next(path.rglob("owner.json")))
    for command in ("show", "verify", "compare"):
        assert run_command([command, str(path)]) == 0
    said = capsys.readouterr().out
    assert said.count("One run each: no verdict.") == 2
    assert run_command(["show", str(path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [each["n"] for each in shown["conditions"]] == [{"torch": 1, "sdpa": 1}]
    assert set(backbench.load(path).arms) == {"torch", "sdpa"}
    assert {*backbench.compare([path]).columns} >= {"condition", "torch", "sdpa", "sdpa / torch"}
    assert run_command(["sweep", "status", str(path), "--json"]) == 4
    stands = json.loads(capsys.readouterr().out)
    assert (stands["done"], stands["failed"], stands["waiting"]) == (2, 1, 0)
    assert [each["state"] for each in stands["cells"]] == ["done", "failed", "done"]


@pytest.mark.slow
def test_a_page_and_other_forms(
    killed_and_resumed: tuple[Path, list[bool], int, str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = killed_and_resumed[0]
    assert run_command(["sweep", "report", str(path), "-o", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").stat().st_size > 10_000
    capsys.readouterr()
    for form in ("--csv", "--markdown", "--json"):
        assert run_command(["compare", str(path), form]) == 0
        assert "sdpa" in capsys.readouterr().out
    assert run_command(["compare", str(path), "--fail-if", "tpot_p50>1.05"]) == 2
    assert "takes no" in capsys.readouterr().err


@pytest.mark.slow
def test_an_interruption_is_130_and_leaves_every_cell_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "night.toml").write_text(CAMPAIGN)
    process = start(tmp_path)
    below = until_measuring(process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=100)
    assert process.returncode == INTERRUPTED and "Traceback" not in err
    assert not psutil.wait_procs(below, timeout=5)[1]
    assert run_command(["sweep", "status", str(tmp_path / "runs" / "night"), "--json"]) == 0
    assert not list((tmp_path / "runs").rglob("held"))


def test_a_dry_run_says_the_cells_and_the_time_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = 'repeats = 2\n[base]\nworkload = "synthetic"\nnum_requests = 40\n'
    Path("night.toml").write_text(text + '[matrix]\nbackend = ["torch", "sdpa"]\nrate = [2, 4]\n')
    assert run_command(["sweep", "night.toml", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.count("waiting") == 8 + 1 and "sdpa · rate 4" in out
    seconds = 2 * 2 * ((40 / 2 + 20) + (40 / 4 + 20))
    assert f"about {seconds / 60:.0f} min for one worker (a guess, since no run has finished)" in out
    assert [path.name for path in tmp_path.iterdir()] == ["night.toml"]


@pytest.mark.parametrize(
    ("matrix", "words"),
    [
        ('backend = ["torch", "sdpaa"]', ["'sdpaa'", "did you mean sdpa"]),
        ('backend = ["torch"]\nmodel = ["tiny", "tinny"]', ["'tinny'", "tiny"]),
        ('backend = ["torch"]\ntp = [1, 3]', ["torch · tp 3", "cannot be divided among 3 devices"]),
        ('backend = ["torch"]\nrate = [1, 0]', ["rate = 0", "--rate must be"]),
        ('backend = ["torch"]\nrate = [1, 2]\n[base.requests]\nwindow = [1, 2]', ["--window"]),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    matrix: str,
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("night.toml").write_text(f'[base]\nworkload = "synthetic"\n[matrix]\n{matrix}\n')
    for command in (["sweep"], ["sweep", "plan"]):
        assert run_command([*command, "night.toml"]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and len(said) < 300 and all(word in said for word in words), said
    assert [path.name for path in tmp_path.iterdir()] == ["night.toml"]


def test_what_is_no_sweep_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("work", "status"):
        assert run_command(["sweep", command, str(tmp_path)]) == 2
        assert "`bench sweep plan` makes one" in capsys.readouterr().err
    (tmp_path / "sweep.json").write_text('{"schema_version": 9}')
    assert run_command(["show", str(tmp_path)]) == 2
    assert "schema version 9" in capsys.readouterr().err
    (tmp_path / "sweep.json").write_text('{"schema_version": 1, "cells": [{"id": "../.."}]}')
    assert run_command(["sweep", "status", str(tmp_path)]) == 2
    assert "no sweep as Backbench writes it" in capsys.readouterr().err
