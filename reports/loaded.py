"""A run as a notebook sees it: its tables as DataFrames, its numbers, its record. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backbench.reports.compare import ratio_table, require_comparable
from backbench.reports.record import RunDirectory, RunRecord, digest_problems

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


def load(path: Path | str) -> LoadedRun:
    """The run directory at `path`.

    Raises:
        ReportError: there is none, or its record cannot be read.
    """
    directory = RunDirectory.open(path)
    return LoadedRun(directory, directory.read_record())


def compare(runs: Iterable[LoadedRun | Path | str]) -> pd.DataFrame:
    """One row a metric: its unit, which way is better, every run's value, and the ratios to the first.

    Raises:
        ReportError: fewer than two runs, or runs of another workload, model or metric schema.
    """
    records = [(each if isinstance(each, LoadedRun) else load(each)).record for each in runs]
    require_comparable(records)
    return ratio_table(records)
