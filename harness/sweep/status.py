"""What is said of a sweep: how many cells stand how, why some failed, and how long the rest will take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from backbench.errors import INVALID, WRONG
from backbench.harness.options import RunOptions
from backbench.harness.sweep.cells import DONE, GIVEN_UP, RUNNING, WAITING, Look, State, left_out
from backbench.reports.record import RunDirectory
from backbench.reports.record.sweep import Cell, Sweep

GUESS_S = 60.0
"""What a run is guessed to take while none has finished: workloads are sized for about a minute ..."""
START_S = 20.0
"""... and one whose requests come at a rate for as long as they come, and this for all around it."""


@dataclass(frozen=True)
class Estimate:
    """How long the cells that are left will take one worker."""

    seconds: float
    measured: bool
    """From runs that finished, and not from a rule."""

    def __str__(self) -> str:
        minutes = f"{self.seconds / 60:.0f} min" if self.seconds >= 90 else f"{self.seconds:.0f} s"
        rule = "by the runs that finished" if self.measured else "a guess, since no run has finished"
        return f"about {minutes} for one worker ({rule})"


@dataclass(frozen=True)
class Status:
    """How a sweep stands."""

    sweep: Sweep
    states: Mapping[Cell, State]

    @classmethod
    def of(cls, sweep: Sweep) -> Status:
        look = Look(sweep)
        return cls(sweep, {cell: look.at(cell) for cell in sweep.cells})

    def count(self, kind: str) -> int:
        return sum(state.kind == kind for state in self.states.values())

    @property
    def done(self) -> int:
        """Cells with a result."""
        return self.count(DONE)

    @property
    def unfinished(self) -> int:
        """Cells that are neither done nor given up."""
        return self.count(RUNNING) + self.count(WAITING)

    @property
    def line(self) -> str:
        """One line."""
        parts = [f"{self.done} of {len(self.states)} runs done"]
        parts += [f"{n} {kind}" for kind in (RUNNING, WAITING, GIVEN_UP) if (n := self.count(kind))]
        if other := left_out(self.sweep):
            parts.append(f"{other} of earlier plans left out")
        if self.codes > 1:
            parts.append(f"measured with {self.codes} states of the code, which are not compared in pairs")
        return f"{self.sweep.name}: {', '.join(parts)}."

    @property
    def codes(self) -> int:
        """With how many states of the code the results were measured."""
        return len({state.code for state in self.states.values() if state.kind == DONE})

    @property
    def exit_code(self) -> int:
        """5 a result is wrong, 4 a cell is given up, else 0."""
        if any(
            RunDirectory.open(self.sweep.result(cell)).read_record().correctness.get("passed") is False
            for cell, state in self.states.items()
            if state.kind == DONE
        ):
            return WRONG
        return INVALID if self.count(GIVEN_UP) else 0

    def estimate(self, options_of: Callable[[Cell], RunOptions]) -> Estimate:
        """By the median of the point's finished runs, else of all; else by the rule above."""
        took: dict[str, list[float]] = {}
        for cell, state in self.states.items():
            if state.seconds is not None:
                took.setdefault(cell.point, []).append(state.seconds)
        everything = [seconds for each in took.values() for seconds in each]
        left = [cell for cell, state in self.states.items() if state.kind in (WAITING, RUNNING)]
        seconds = sum(
            median(took.get(cell.point) or everything) if everything else guess(options_of(cell))
            for cell in left
        )
        return Estimate(seconds, bool(everything))

    def to_json(self, left: Estimate) -> dict[str, Any]:
        """What `--json` prints."""
        counts = {kind: self.count(kind) for kind in (DONE, RUNNING, WAITING, GIVEN_UP)}
        found = {"name": self.sweep.name, "directory": str(self.sweep.path), **counts}
        found |= {"left_out": left_out(self.sweep)}
        found |= {"estimate_s": left.seconds, "estimate_measured": left.measured}
        return found | {
            "cells": [
                {"id": cell.id, "point": cell.point, "run": cell.block + 1, "state": state.kind}
                | {"note": state.note, "seconds": state.seconds}
                for cell, state in self.states.items()
            ]
        }


def guess(options: RunOptions) -> float:
    """Seconds of a run of which nothing was measured."""
    rate, requests = options.load.get("rate"), options.load.get("num_requests")
    return START_S + requests / rate if rate and requests else GUESS_S
