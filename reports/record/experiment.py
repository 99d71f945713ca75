"""An experiment directory: runs of one or more arms, in the order they ran, and the file that lists them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from backbench.errors import ReportError, shown
from backbench.reports.record.bundle import is_file, read_object
from backbench.reports.record.directory import RunDirectory
from backbench.reports.record.sweep import Measured, Sweep, is_sweep, read_sweep

EXPERIMENT_FILE = "experiment.json"
EXPERIMENT_VERSION = 1


@dataclass(frozen=True)
class Listed:
    """One finished run of an experiment."""

    path: str
    """Its directory, relative to the experiment's."""
    arm: str
    block: int
    """Runs of one block replay the same requests, right after each other."""
    seed: int
    uuid: str
    """The record's own."""


@dataclass(frozen=True)
class Experiment:
    """What experiment.json says."""

    path: Path
    """The directory."""
    arms: tuple[str, ...]
    """The first is the reference."""
    blocks: int
    """As many as were asked for; an interrupted experiment has fewer."""
    command: str
    """As typed, redacted."""
    runs: tuple[Listed, ...] = ()
    """In the order they ran."""

    @property
    def finished(self) -> bool:
        """Every run that was asked for is there."""
        return len(self.runs) == self.blocks * len(self.arms)

    def with_run(self, run: Listed) -> Experiment:
        """And one run more."""
        return replace(self, runs=(*self.runs, run))

    def directory(self, run: Listed) -> RunDirectory:
        """Where a listed run is."""
        return RunDirectory.open(self.path / run.path)

    def write(self) -> None:
        """Write experiment.json; a reader sees the old file or the new one, never a part."""
        content = asdict(self) | {"schema_version": EXPERIMENT_VERSION}
        del content["path"]
        temporary = self.path / f".{EXPERIMENT_FILE}.tmp"
        try:
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            temporary.replace(self.path / EXPERIMENT_FILE)
        except OSError as error:
            raise ReportError(f"Cannot write {self.path / EXPERIMENT_FILE}: {error.strerror}.") from None


def is_experiment(path: Path) -> bool:
    """Whether `path` is an experiment's directory or the file inside it; a sweep's is one, too."""
    return path.name == EXPERIMENT_FILE or is_file(path / EXPERIMENT_FILE) or is_sweep(path)


def read_experiment(path: Path) -> Experiment:
    """The experiment at `path`.

    Raises:
        ReportError: experiment.json cannot be read or is none.
    """
    if is_sweep(path):
        return _of_sweep(read_sweep(path))
    directory = path.parent if path.name == EXPERIMENT_FILE else path
    file = directory / EXPERIMENT_FILE
    data = read_object(file, "experiment", EXPERIMENT_VERSION)
    try:
        return _experiment(directory, data)
    except (KeyError, TypeError, ValueError) as error:
        raise ReportError(f"{file} is no experiment as Backbench writes it ({shown(str(error))}).") from None


def _experiment(directory: Path, data: dict[str, Any]) -> Experiment:
    runs = tuple(Listed(**each) for each in data["runs"])
    arms = tuple(data["arms"])
    if not arms or not all(isinstance(arm, str) for arm in (*arms, data["command"])):
        raise ValueError("arms")
    if len({(run.arm, run.block) for run in runs}) != len(runs):
        raise ValueError("two runs of one arm in one block")
    for run in runs:
        whole = all(isinstance(number, int) for number in (run.block, run.seed))
        inside = PurePosixPath(run.path)
        if run.arm not in arms or not whole or inside.is_absolute() or ".." in inside.parts:
            raise ValueError(f"run {run.path}")
    return Experiment(directory, arms, int(data["blocks"]), data["command"], runs)


def _of_sweep(sweep: Sweep) -> Experiment:
    """The sweep as an experiment: an arm a point, and the results that are there.

    A block of it holds runs that compare in pairs: one condition and repeat, on one host, with one state of
    the code. Points that several kinds of device measured are an arm each.
    """
    found = [(cell, *_seen(sweep.result(cell))) for cell in sweep.cells if sweep.result(cell).is_dir()]
    several = len({device for *_, device in found}) > 1
    names: dict[str, None] = {cell.point: None for cell in sweep.cells} if not several else {}
    blocks: dict[tuple[str, int, str, str], int] = {}
    runs: list[tuple[int, Listed]] = []
    for cell, uuid, started, measured, device in found:
        arm = f"{cell.point} · {device}" if several else cell.point
        names[arm] = None
        where = (measured.host, measured.code) if measured else ("", "")
        block = blocks.setdefault((cell.condition, cell.block, *where), len(blocks))
        path = sweep.result(cell).relative_to(sweep.path).as_posix()
        runs.append((started, Listed(path, arm, block, cell.seed, uuid)))
    ordered = tuple(run for _, run in sorted(runs, key=lambda each: each[0]))
    return Experiment(sweep.path, tuple(names), sweep.repeats, sweep.command, ordered)


def _seen(result: Path) -> tuple[str, int, Measured | None, str]:
    """(uuid, start, where from, device); of a record that cannot be read nothing is known, and whoever
    opens it will say so."""
    try:
        record = RunDirectory.open(result).read_record()
    except ReportError:
        return "", 0, None, ""
    device = (record.system.get("device") or {}).get("name", "")
    started = record.run.get("start_unix_ns")
    return (
        str(record.run.get("uuid")),
        started if isinstance(started, int) else 0,
        Measured.read(result),
        str(device),
    )
