"""The arms of a sweep under each of its conditions: what compares with what in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from backbench.reports.arms import Arm
from backbench.reports.record.sweep import read_sweep


def arms_by_condition(path: Path, arms: Sequence[Arm]) -> dict[str, list[Arm]]:
    """Condition -> its arms of the sweep at `path`, in order and named without it."""
    cells = {cell.id: cell for cell in read_sweep(path).cells}
    found: dict[str, list[Arm]] = {}
    for arm in arms:
        directory = arm.runs[0].directory
        assert directory is not None
        cell = cells[directory.path.parent.name]
        label = cell.arm + arm.label.removeprefix(cell.point)
        found.setdefault(cell.condition, []).append(replace(arm, label=label))
    return found
