"""A run as a notebook sees it: its tables as DataFrames, its numbers, its record. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backbench.reports.arms import Arm, Run, open_arms, require_comparable
from backbench.reports.conditions import arms_by_condition
from backbench.reports.grouping import grouped, incomparable_groups, require_key
from backbench.reports.quantities import QUANTITIES, read
from backbench.reports.ratios import ratio_table
from backbench.reports.record import RunDirectory, RunRecord, digest_problems
from backbench.reports.record.bundle import expand
from backbench.reports.record.experiment import Experiment, is_experiment, read_experiment
from backbench.reports.record.sweep import is_sweep

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class LoadedRun:
    """One run directory. Tables are read when they are asked for, and without the warm-up."""

    directory: RunDirectory
    record: RunRecord

    @property
    def path(self) -> Path:
        return self.directory.path

    @property
    def metrics(self) -> dict[str, Any]:
        """The record's `metrics` section; docs/metrics.md defines every name."""
        return self.record.metrics

    @cached_property
    def _requests(self) -> pd.DataFrame:
        return self.directory.read_requests()

    @cached_property
    def requests(self) -> pd.DataFrame:
        """One row a measured request; times in ns since the run's start."""
        return self._requests[~self._requests["warmup"]].reset_index(drop=True)

    @cached_property
    def warmup_requests(self) -> pd.DataFrame:
        """One row a warm-up request; those handed over got tokens in measured time."""
        return self._requests[self._requests["warmup"]].reset_index(drop=True)

    @cached_property
    def steps(self) -> pd.DataFrame:
        """One row an engine step that ended after the run's start."""
        steps = self.directory.read_steps()
        return steps[steps["end_ns"] > 0].reset_index(drop=True)

    @cached_property
    def telemetry(self) -> pd.DataFrame:
        """One row a sample and device, from the run's start on."""
        telemetry = self.directory.read_telemetry()
        return telemetry[telemetry["time_ns"] >= 0].reset_index(drop=True)

    @cached_property
    def problems(self) -> tuple[str, ...]:
        """What of the files is not as it was written; `bench verify` recomputes the numbers too."""
        return tuple(digest_problems(self.directory, self.record))

    def __repr__(self) -> str:
        return f"LoadedRun({str(self.path)!r})"


@dataclass(frozen=True)
class LoadedExperiment:
    """One experiment directory: the runs of each arm, in the order of their blocks."""

    experiment: Experiment
    arms: dict[str, list[LoadedRun]]
    """Label -> its runs."""

    @property
    def path(self) -> Path:
        return self.experiment.path

    @property
    def runs(self) -> list[LoadedRun]:
        """All runs, in the order they ran."""
        by_uuid = {run.record.run["uuid"]: run for runs in self.arms.values() for run in runs}
        return [by_uuid[listed.uuid] for listed in self.experiment.runs if listed.uuid in by_uuid]

    @cached_property
    def values(self) -> pd.DataFrame:
        """One row a run: its arm, block and seed, why no verdict rests on it (None where one may), and every
        quantity by its dotted name, in its own unit."""
        import pandas as pd

        rows = []
        listed = {each.uuid: each for each in self.experiment.runs}
        for label, runs in self.arms.items():
            for run in runs:
                at = listed[run.record.run["uuid"]]
                row: dict[str, Any] = {"arm": label, "block": at.block, "seed": at.seed}
                row["left_out"] = Run(run.record).left_out
                rows.append(row | {".".join(each.path): read(run.record, each).value for each in QUANTITIES})
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        return f"LoadedExperiment({str(self.path)!r})"


@dataclass(frozen=True)
class LoadedBundle:
    """A bundle of several runs and experiments."""

    path: Path
    entries: dict[str, LoadedRun | LoadedExperiment]
    """By name: "run-1", "experiment-2"."""

    def __repr__(self) -> str:
        return f"LoadedBundle({str(self.path)!r}, {list(self.entries)})"


Loaded = LoadedRun | LoadedExperiment | LoadedBundle


def load(path: Path | str) -> Loaded:
    """The run or experiment directory at `path`, or what the bundle there holds.

    Raises:
        ReportError: there is none, or a record cannot be read.
    """
    entries = expand(Path(path))
    if len(entries) == 1:
        return _entry(entries[0])
    return LoadedBundle(Path(path), {each.name: _entry(each) for each in entries})


def _entry(path: Path) -> LoadedRun | LoadedExperiment:
    if is_experiment(path):
        arms = {arm.label: [_loaded(run) for run in arm.runs] for arm in open_arms([path])}
        return LoadedExperiment(read_experiment(path), arms)
    return load_run(path)


def load_run(path: Path | str) -> LoadedRun:
    """The run directory at `path`; raises ReportError as `load` does."""
    directory = RunDirectory.open(path)
    return LoadedRun(directory, directory.read_record())


def _loaded(run: Run) -> LoadedRun:
    assert run.directory is not None
    return LoadedRun(run.directory, run.record)


def compare(runs: Iterable[Loaded | Path | str], group_by: str | None = None) -> pd.DataFrame:
    """One row a metric: its unit, which way is better, every arm's value, and the ratios to the first.

    A run is an arm of one run; an experiment brings its arms, a bundle what it holds; `group_by` pools them
    ("backend", "vendor", "quantization", "model", "tag:KEY"). Ratios have an interval between runs and a
    verdict where the runs allow one. A sweep alone has its rows under each condition, named in a
    column.

    Raises:
        ReportError: fewer than two arms, or runs of another workload, model or metric schema.
    """
    paths = [Path(each) if isinstance(each, Path | str) else each.path for each in runs]
    arms = open_arms(paths)
    if len(paths) == 1 and is_sweep(paths[0]) and group_by is None:
        return _compare_sweep(paths[0], arms)
    if group_by is not None:
        arms = grouped(arms, require_key(group_by))
    require_comparable(arms, incomparable_groups(arms, group_by))
    return ratio_table(arms)


def _compare_sweep(path: Path, arms: list[Arm]) -> pd.DataFrame:
    import pandas as pd

    tables = []
    for condition, each in arms_by_condition(path, arms).items():
        if len(each) > 1:
            require_comparable(each)
        table = ratio_table(each)
        table.insert(0, "condition", condition)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)
