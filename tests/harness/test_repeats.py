"""Which runs a series makes, in which order, from which command lines, and what stays when it ends early."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from backbench.errors import INTERRUPTED, HarnessError
from backbench.harness import repeats
from backbench.harness.commands.run import run
from backbench.harness.options import RunOptions, run_options
from backbench.harness.repeats import (
    Ended,
    Going,
    arguments,
    asked_arms,
    backends,
    in_new_process,
    is_series,
    order,
    run_repeats,
)
from backbench.reports.record import RunDirectory, RunRecord
from backbench.reports.record.experiment import read_experiment

ASKED = RunOptions(workload="batch:2x8+4", backend="torch,sdpa", repeat=2, seed=5)


class Scripted:
    """Ends each run as told, 0 unless said otherwise, and writes a record where one would be."""

    def __init__(self, *ends: int | BaseException) -> None:
        self.ends = list(ends)
        self.asked: list[dict[str, object]] = []

    def __call__(self, typed: Sequence[str]) -> Ended:
        end = self.ends[len(self.asked)] if len(self.asked) < len(self.ends) else 0
        given = run.make_context("run", list(typed[1:])).params
        self.asked.append(given)
        if isinstance(end, BaseException):
            raise end
        if end != 2:
            status = "interrupted" if end == INTERRUPTED else "complete"
            section = {"uuid": f"u{len(self.asked)}", "seed": given["seed"], "status": status}
            RunDirectory.create(given["out"]).write_record(RunRecord(run=section))
        return Ended(end, "not valid: noise\nerror: There is no backend nope.\n" if end else "")


def series(out: Path, *ends: int | BaseException) -> tuple[object, Scripted]:
    launch = Scripted(*ends)
    return run_repeats(replace(ASKED, out=out), lambda text: None, launch), launch


def test_arms_take_turns() -> None:
    assert list(order(("a", "b"), 3)) == [(0, "a"), (0, "b"), (1, "b"), (1, "a"), (2, "a"), (2, "b")]


def test_one_run_of_one_backend_is_no_series() -> None:
    assert not is_series(replace(ASKED, backend="torch", repeat=1))
    assert is_series(replace(ASKED, repeat=1)) and is_series(replace(ASKED, backend="torch"))
    with pytest.raises(HarnessError, match="empty name"):
        backends(replace(ASKED, backend="torch,"))


def test_every_backend_takes_every_scheme() -> None:
    def arms(**given: object) -> list[str]:
        return list(asked_arms(run_options({"workload": "batch:2x8+4", "backend": "torch"} | given)))

    assert arms() == arms(quantize="int8") == ["torch"]
    assert arms(quantize="none,int8,int8") == ["none", "int8", "int8 (2)"]
    crossed = {"backend": "torch,sdpa", "quantize": "none,nvfp4"}
    assert arms(**crossed) == ["torch none", "torch nvfp4", "sdpa none", "sdpa nvfp4"]
    asked = run_options({"workload": "batch:2x8+4"} | crossed)
    own = asked_arms(asked)["sdpa nvfp4"]
    assert own == {"backend": "sdpa", "quantize": "nvfp4"}
    typed = arguments(asked, own, 3, Path("x"))
    assert "--quantize=nvfp4" in typed and "--backend=sdpa" in typed
    assert is_series(run_options({"workload": "batch:2x8+4", "backend": "torch", "quantize": "none,int8"}))


def test_blocks_share_a_seed_and_no_two_blocks_do(tmp_path: Path) -> None:
    launch, told = Scripted(), list[str]()
    run_repeats(replace(ASKED, out=tmp_path / "x"), told.append, launch)
    assert told[2] == "Run 3 of 4: sdpa, block 2"
    assert [(each["backend"], each["seed"]) for each in launch.asked] == [
        ("torch", 5),
        ("sdpa", 5),
        ("sdpa", 6),
        ("torch", 6),
    ]
    experiment = read_experiment(tmp_path / "x")
    assert experiment.arms == ("torch", "sdpa") and experiment.finished
    assert [(each.path, each.block, each.uuid) for each in experiment.runs] == [
        ("1-torch", 0, "u1"),
        ("2-sdpa", 0, "u2"),
        ("3-sdpa", 1, "u3"),
        ("4-torch", 1, "u4"),
    ]


def test_a_waiting_parent_looks_up(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[None] = []
    monkeypatch.setattr(repeats, "MEANWHILE_S", 0.01)
    assert in_new_process(["--version"], meanwhile=lambda: looked.append(None)).code == 0
    assert looked


def test_a_long_run_is_said_to_be_going() -> None:
    now_s, told = 0.0, list[str]()
    going = Going(told.append, 10.0, lambda: now_s)
    for which, seconds in (("Run 1", 23), ("Run 2", 12)):
        going.begin(which)
        begun_s = now_s
        while now_s < begun_s + seconds:
            now_s += 1.0
            going.look()
    assert told == ["Run 1", "Run 1, 10 s so far", "Run 1, 20 s so far", "Run 2", "Run 2, 10 s so far"]


def test_a_runs_command_line_asks_for_the_same(tmp_path: Path) -> None:
    given = {
        "workload": "synthetic",
        "backend": "sdpa",
        "rate": 2.5,
        "window": (1.0, 2.0),
        "slo": "ttft=0.5,tpot=0.05",
        "graphs": False,
        "dtype": "fp32",
        "max_seqs": 8,
    }
    asked = run_options(given)
    typed = arguments(asked, {"backend": "sdpa"}, 3, tmp_path / "out")
    params = run.make_context("run", typed[1:]).params
    for name in ("config", "as_json", "quiet", "verbose"):
        params.pop(name)
    assert params.pop("no_report") is True
    assert run_options(params) == replace(asked, seed=3, out=tmp_path / "out")


@pytest.mark.parametrize("end", [INTERRUPTED, KeyboardInterrupt()])
def test_an_interruption_keeps_what_finished(tmp_path: Path, end: int | BaseException) -> None:
    done, launch = series(tmp_path / "x", 0, 4, end)
    assert done.code == INTERRUPTED and len(launch.asked) == 3  # type: ignore[attr-defined]
    assert [each.uuid for each in read_experiment(tmp_path / "x").runs] == ["u1", "u2"]


def test_a_failure_says_why_and_keeps_what_finished(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match=r"Run 2 \(sdpa\) failed: There is no backend nope. 1 finished"):
        series(tmp_path / "x", 0, 2)
    assert len(read_experiment(tmp_path / "x").runs) == 1


def test_nothing_finished_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match="Run 1"):
        series(tmp_path / "x", 2)
    assert not (tmp_path / "x").exists()


def test_the_worst_code_is_the_series(tmp_path: Path) -> None:
    done, _ = series(tmp_path / "x", 0, 5, 4)
    assert done.code == 5  # type: ignore[attr-defined]


def test_a_directory_in_use_is_refused(tmp_path: Path) -> None:
    series(tmp_path / "x")
    with pytest.raises(Exception, match="not empty"):
        series(tmp_path / "x")


@pytest.mark.slow
def test_sigterm_ends_the_run_in_progress_and_keeps_the_finished(tmp_path: Path) -> None:
    out = tmp_path / "x"
    command = [sys.executable, "-m", "backbench", "run", "-w", "batch:2x8+4", "-b", "torch", "--warmup", "1"]
    process = subprocess.Popen(
        [*command, "--repeat", "50", "--no-report", "-o", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    file, until = out / "experiment.json", time.monotonic() + 120
    try:
        while not (file.exists() and file.stat().st_size and json.loads(file.read_text())["runs"]):
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == INTERRUPTED, said
    assert "finished runs are kept" in said and "Traceback" not in said
    assert read_experiment(out).runs
