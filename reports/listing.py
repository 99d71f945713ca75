"""The runs and experiments below a directory, and the newest of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from backbench.errors import ReportError
from backbench.reports.arms import Arm, Run, measured, open_run
from backbench.reports.compare import backend_name, own_label
from backbench.reports.metrics.validity import fails
from backbench.reports.quantities import quantity
from backbench.reports.record import RECORD_FILE
from backbench.reports.record.experiment import is_experiment, read_experiment
from backbench.reports.record.schema import LOG_FILE

LATEST = "latest"
RATE = quantity("metrics", "output_tokens_per_s", "whole_run")
TPOT = quantity("metrics", "tpot_s", "p50")


@dataclass(frozen=True)
class Entry:
    """One run, or one arm of an experiment."""

    path: Path
    utc: str = ""
    """When its last run began, ISO 8601; empty = not known."""
    label: str = ""
    tags: tuple[tuple[str, str], ...] = ()
    workload: str = ""
    backend: str = ""
    model: str = ""
    quantization: str | None = None
    runs: int = 1
    finished: bool = False
    """Every run that was asked for came to its end."""
    validity: str = ""
    """"valid", or in a few words what is not."""
    output_tokens_per_s: float | None = None
    """Over the whole run; the median of an arm's."""
    tpot_p50_s: float | None = None
    problem: str | None = None
    """Why it cannot be read."""


def entries(root: Path) -> list[Entry]:
    """All runs and arms below `root`, oldest first; those that cannot be read come first of all.

    Raises:
        ReportError: `root` is no directory.
    """
    if not root.is_dir():
        raise ReportError(f"There is no directory {root}; `bench run` makes runs/.")
    return sorted(_below(root), key=_when)


def latest(root: Path, label: str | None = None) -> Path:
    """The newest finished run or experiment below `root`, of those with this label.

    Raises:
        ReportError: there is none.
    """
    of = "" if label is None else f" labelled {label!r}"
    found = [each for each in entries(root) if each.finished and label in (None, each.label)]
    if not found:
        raise ReportError(f"There is no finished run{of} below {root}; `bench list {root}` shows what is.")
    return found[-1].path


def _when(entry: Entry) -> tuple[datetime, str]:
    """Runs of one second are in the order of their names."""
    try:
        when = datetime.fromisoformat(entry.utc)
    except ValueError:
        when = datetime.min
    return when if when.tzinfo else when.replace(tzinfo=UTC), str(entry.path)


def _below(root: Path) -> Iterator[Entry]:
    listed: set[Path] = set()
    closed: list[OSError] = []
    for folder, folders, files in os.walk(root, onerror=closed.append):
        folders.sort()
        path = Path(folder)
        try:
            if is_experiment(path):
                found, inside = _experiment(path)
                listed |= inside
                yield from found
            elif RECORD_FILE in files and path not in listed:
                yield _entry(path, [Run(open_run(path)[1])], finished=True)
            elif LOG_FILE in files:
                yield Entry(path, problem=f"still going or killed; if killed, `bench recover {path}`")
        except ReportError as error:
            yield Entry(path, problem=str(error))
    for closed_folder in closed:
        yield Entry(Path(closed_folder.filename), problem=str(closed_folder.strerror))


def _experiment(path: Path) -> tuple[list[Entry], set[Path]]:
    """An entry for each arm, and the directories of the runs that are in them."""
    experiment = read_experiment(path)
    found = []
    for name in experiment.arms:
        paths = [path / run.path for run in experiment.runs if run.arm == name]
        if paths:
            runs = [Run(open_run(each)[1]) for each in paths]
            found.append(_entry(path, runs, experiment.finished, name))
    if not found:
        return [Entry(path, problem="an experiment without a finished run")], set()
    return found, {path / run.path for run in experiment.runs}


def _entry(path: Path, runs: Sequence[Run], finished: bool, arm: str | None = None) -> Entry:
    one = runs[-1].record
    sample = Arm("", tuple(runs))
    return Entry(
        path,
        max(str(run.record.run.get("utc") or "") for run in runs),
        own_label(one),
        tuple(sorted((one.run.get("tags") or {}).items())),
        str(one.workload.get("name") or ""),
        arm or backend_name(one),
        str(one.model.get("name") or ""),
        one.model.get("quantization"),
        len(runs),
        finished and all(run.record.run["status"] == "complete" for run in runs),
        _validity(runs),
        measured(sample, RATE).value,
        measured(sample, TPOT).value,
    )


def _validity(runs: Sequence[Run]) -> str:
    doubtful = [run.record for run in runs if run.left_out is not None]
    if not doubtful:
        return "valid"
    statuses = {record.run["status"] for record in doubtful} - {"complete"}
    what = statuses.pop() if statuses else "not valid" if any(map(fails, doubtful)) else "disturbed"
    return what if len(runs) == 1 else f"{len(doubtful)} of {len(runs)} {what}"
