"""One run as the page draws it: its record, its colours, and its tables once they are needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from backbench.reports.arms import Arm, arm_of
from backbench.reports.metrics.run import RunTables
from backbench.reports.page.style import RunStyle
from backbench.reports.record import RunRecord


@dataclass(frozen=True)
class RunData:
    """One run as the report sees it."""

    record: RunRecord
    style: RunStyle
    read: Callable[[], RunTables]
    problems: tuple[str, ...] = ()
    """What of its files is not as it was written."""
    arm: Arm | None = None
    """All runs of the arm that this one stands for; None = it stands for itself."""

    @property
    def sample(self) -> Arm:
        """The arm: this run alone where it is no other."""
        return self.arm or arm_of(self.record, self.style.label)

    @cached_property
    def tables(self) -> RunTables:
        """Read when a figure first needs them: of 200 runs most are drawn by their records alone."""
        return self.read()


@dataclass(frozen=True)
class Page:
    """The runs of one report; ratios are to the first."""

    runs: tuple[RunData, ...]
    drawn: tuple[RunData, ...]
    """Those that have figures and details of their own: all, unless they are too many."""

    @property
    def records(self) -> list[RunRecord]:
        return [run.record for run in self.runs]

    @property
    def names(self) -> list[str]:
        return labels_of(self.runs)

    @property
    def arms(self) -> list[Arm]:
        return [run.sample for run in self.runs]


def labels_of(runs: Sequence[RunData]) -> list[str]:
    """The runs' names on the page."""
    return [run.style.label for run in runs]
