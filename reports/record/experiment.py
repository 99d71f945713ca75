"""An experiment directory: runs of one or more arms, in the order they ran, and the file that lists them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from backbench.errors import ReportError, shown
from backbench.reports.record.bundle import is_file, read_bytes
from backbench.reports.record.directory import RunDirectory
from backbench.reports.record.schema import check_version

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
    """Whether `path` is an experiment's directory or the file inside it."""
    return path.name == EXPERIMENT_FILE or is_file(path / EXPERIMENT_FILE)


def read_experiment(path: Path) -> Experiment:
    """The experiment at `path`.

    Raises:
        ReportError: experiment.json cannot be read or is none.
    """
    directory = path.parent if path.name == EXPERIMENT_FILE else path
    file = directory / EXPERIMENT_FILE
    try:
        data = json.loads(read_bytes(file).decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ReportError(f"{file} cannot be read: {type(error).__name__}; restore it.") from None
    if not isinstance(data, dict):
        raise ReportError(f"{file} holds no experiment.")
    check_version(data.get("schema_version"), str(file), (EXPERIMENT_VERSION,))
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
