"""What is said of a sweep: counts, reasons, time, exit code."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from backbench.harness.options import RunOptions, run_options
from backbench.harness.sweep import status
from backbench.harness.sweep.cells import DONE, GIVEN_UP, RUNNING, WAITING, State
from backbench.harness.sweep.status import GUESS_S, START_S, Status, guess
from backbench.reports.record import RunDirectory, RunRecord
from backbench.reports.record.sweep import Cell, Sweep

CELLS = tuple(Cell(f"{block}{arm}", arm, "", block, block) for block in range(2) for arm in ("torch", "sdpa"))
OPTIONS = {"workload": "synthetic", "backend": "torch"}


def stands(path: Path, *states: State) -> Status:
    return Status(Sweep(path, "night", 2, "", CELLS), dict(zip(CELLS, states, strict=True)))


def no_rule(cell: Cell) -> RunOptions:
    raise AssertionError("what finished says it")


def test_the_time_left_comes_from_what_finished_and_from_the_points_own_runs_first(tmp_path: Path) -> None:
    waiting, torch, sdpa = State(WAITING), State(DONE, seconds=100.0), State(DONE, seconds=10.0)
    left = stands(tmp_path, torch, sdpa, waiting, waiting).estimate(no_rule)
    assert left.seconds == 110 and "about 2 min" in str(left) and "by the runs that finished" in str(left)
    assert stands(tmp_path, torch, waiting, waiting, waiting).estimate(no_rule).seconds == 300
    assert stands(tmp_path, torch, sdpa, State(GIVEN_UP), waiting).estimate(no_rule).seconds == 10


def test_without_a_finished_run_the_time_is_a_guess_by_a_rule(tmp_path: Path) -> None:
    left = stands(tmp_path, *[State(WAITING)] * 4).estimate(lambda cell: run_options(OPTIONS))
    assert left.seconds == 4 * GUESS_S and "a guess" in str(left)
    assert guess(run_options(OPTIONS | {"rate": 2, "num_requests": 60})) == START_S + 30


def test_the_line_counts_everything_and_names_what_does_not_pair(tmp_path: Path) -> None:
    old, new = State(DONE, code="a"), State(DONE, code="b")
    assert stands(tmp_path, old, old, State(WAITING), State(RUNNING)).line == (
        "night: 2 of 4 runs done, 1 running, 1 waiting."
    )
    found = stands(tmp_path, old, new, State(GIVEN_UP, "no card"), old)
    assert found.line.startswith("night: 3 of 4 runs done, 1 failed, measured with 2 states of the code")
    (tmp_path / "cells" / "of-before").mkdir(parents=True)
    assert "1 of earlier plans left out" in found.line


@pytest.mark.parametrize(
    ("passed", "last", "code"),
    [(True, DONE, 0), (None, WAITING, 0), (True, GIVEN_UP, 4), (False, DONE, 5), (False, GIVEN_UP, 5)],
)
def test_the_exit_code_is_the_worst_that_is_there(
    tmp_path: Path, passed: bool | None, last: str, code: int
) -> None:
    found = stands(tmp_path, State(DONE), State(WAITING), State(WAITING), State(last))
    for cell in CELLS:
        record = replace(RunRecord(run={"status": "complete"}), correctness={"passed": passed})
        RunDirectory.create(found.sweep.result(cell)).write_record(record)
    assert found.exit_code == code
    assert status.INVALID == 4 and status.WRONG == 5
