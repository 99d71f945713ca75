"""Whatever is killed, and whenever: every cell ends with one verified result, and the table is the same."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scripted_worker import TEMPLATE, measure_script, start_killing, start_worker

import backbench
from backbench.harness.cli import run_command
from backbench.harness.options import run_options
from backbench.harness.repeats import Ended
from backbench.harness.sweep.cells import DONE, Look
from backbench.harness.sweep.lease import BROKEN, HELD, PUBLISHED, RELEASED, leases
from backbench.harness.sweep.worker import Worker
from backbench.reports.record.sweep import Measured, Sweep


def write_template(folder: Path) -> None:
    """A small run: it is verified by every worker, again and again."""
    given = {"workload": "synthetic", "backend": "torch", "num_requests": 2}
    options = run_options(given | {"input_lengths": "fixed:8", "output_lengths": "fixed:5"})
    measure_script(options, folder / TEMPLATE, lambda: None)


def results(sweep: Sweep) -> list[Path]:
    return [sweep.result(cell) for cell in sweep.cells if sweep.result(cell).exists()]


def in_progress(sweep: Sweep) -> bool:
    """Whether a worker is somewhere in the half second of a run."""
    held = sweep.path.glob("cells/*/lease-*/held/owner.json")
    return any(not (each.parents[2] / "result").exists() for each in held)


def require_one_result_each(sweep: Sweep) -> None:
    """By looking afresh at what lies there."""
    look = Look(sweep)
    for cell in sweep.cells:
        assert look.at(cell).kind == DONE, look.at(cell)
        measured = Measured.read(sweep.result(cell))
        assert measured is not None and measured.cell == cell.id
        found = leases(sweep.directory(cell))
        ends = [each.how for each in found]
        assert HELD not in ends[:-1] and ends.count(PUBLISHED) <= 1
        assert ends[-1] in (PUBLISHED, RELEASED, HELD), "held: killed just after it had published"
        assert not list(sweep.directory(cell).glob("lease-*/*/rejected")), "no result was ever thrown away"


def test_twelve_points_killed_twice_end_as_if_nothing_had_happened(
    make_sweep: Callable[..., Sweep], capsys: pytest.CaptureFixture[str]
) -> None:
    matrix = {"backend": ["torch", "sdpa"], "concurrency": [1, 2, 3, 4, 5, 6]}
    calm, killed = (make_sweep(matrix, name) for name in ("calm", "killed"))
    undisturbed = start_worker(calm.path, 0.0)
    for done in (3, 8):
        worker = start_worker(killed.path, 0.5)
        while len(results(killed)) < done or not in_progress(killed):
            assert worker.poll() is None
            time.sleep(0.01)
        worker.kill()
        worker.wait()
    assert len(results(killed)) < 12
    assert start_worker(killed.path, 0.0).wait() == 0 == undisturbed.wait()

    require_one_result_each(killed)
    assert any(each.how == BROKEN for cell in killed.cells for each in leases(killed.directory(cell)))
    assert [cell.id for cell in killed.cells] == [cell.id for cell in calm.cells]
    for command in (["show"], ["compare"], ["compare", "--json"]):
        said = []
        for sweep in (calm, killed):
            assert run_command([command[0], str(sweep.path), *command[1:]]) == 0
            said.append(capsys.readouterr().out)
        assert said[0] == said[1] != ""
    tables = [backbench.compare([sweep.path]) for sweep in (calm, killed)]
    assert tables[0].equals(tables[1])
    assert run_command(["verify", str(killed.path)]) == 0


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_four_workers_killed_at_random_leave_one_result_a_cell(
    make_sweep: Callable[..., Sweep], tmp_path: Path, seed: int
) -> None:
    sweep = make_sweep({"backend": ["torch", "sdpa"], "concurrency": [1, 2, 3, 4]}, repeats=5)
    assert len(sweep.cells) == 40
    write_template(tmp_path)
    kills = 12
    assert start_killing(sweep.path, seed, kills).wait() == 0
    require_one_result_each(sweep)
    broken = [each for cell in sweep.cells for each in leases(sweep.directory(cell)) if each.how == BROKEN]
    assert broken, "no worker was killed while it held a cell"


class Killed(BaseException):
    """What a SIGKILL leaves: nothing that comes after it runs."""


def test_a_worker_killed_at_any_change_of_the_disk_leaves_a_cell_that_goes_on(
    make_sweep: Callable[..., Sweep], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first rename, directory or file that a worker makes, before the second, ..."""
    write_template(tmp_path)
    left = -1

    def counted(name: str) -> None:
        original = getattr(Path, name)

        def change(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed
            return original(*arguments, **named)

        monkeypatch.setattr(Path, name, change)

    def copy(options: object, out: Path, beat: Callable[[], None]) -> Ended:
        out.mkdir()
        for file in (tmp_path / TEMPLATE).iterdir():
            (out / file.name).write_bytes(file.read_bytes())
        return Ended(0, "")

    sweep = make_sweep({"backend": ["torch"]})
    for name in ("rename", "replace", "mkdir", "write_text", "write_bytes", "unlink"):
        counted(name)
    places = 0
    while True:
        places += 1
        shutil.rmtree(sweep.path)
        left = -1
        sweep = make_sweep({"backend": ["torch"]})
        left = places
        try:
            Worker(sweep.path, lambda text: None, copy).work()
            break  # there were no more changes to be killed at
        except Killed:
            left = -1
        for held in leases(sweep.directory(sweep.cells[0])):  # this process lives; that one would not
            if held.how == HELD:
                os.utime(held.held / "owner.json", (0, 0))
        Worker(sweep.path, lambda text: None, copy).work()
        require_one_result_each(sweep)
    assert places > 10
