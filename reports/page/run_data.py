"""One run as the page draws it: its record, its tables and its colours."""

from __future__ import annotations

from dataclasses import dataclass

from backbench.reports.arms import Arm, arm_of
from backbench.reports.metrics.run import RunTables
from backbench.reports.page.style import RunStyle
from backbench.reports.record import RunRecord


@dataclass(frozen=True)
class RunData:
    """One run as the report sees it."""

    record: RunRecord
    style: RunStyle
    tables: RunTables
    problems: tuple[str, ...] = ()
    """What of its files is not as it was written."""
    arm: Arm | None = None
    """All runs of the arm that this one stands for; None = it stands for itself."""

    @property
    def sample(self) -> Arm:
        """The arm: this run alone where it is no other."""
        return self.arm or arm_of(self.record, self.style.label)


@dataclass(frozen=True)
class Page:
    """The runs of one report; ratios are to the first."""

    runs: tuple[RunData, ...]

    @property
    def records(self) -> list[RunRecord]:
        return [run.record for run in self.runs]

    @property
    def names(self) -> list[str]:
        return [run.style.label for run in self.runs]
