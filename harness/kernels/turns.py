"""A process that times kernels when it is told to, so that two sides take turns, in it or in two of them.

One JSON object a line: {"begin": {side: options}} sets every side's kernels up anew and says what they are;
{"turn": side} makes one round of each of that side's kernels and gives the seconds of a call.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from backbench.errors import BackbenchError
from backbench.harness import provenance
from backbench.harness.kernels.cost import require_memory
from backbench.harness.kernels.measure import Cell
from backbench.harness.kernels.plan import Asked, Planned, plan

ROUND_S = 0.005
"""Measuring time of one round of one kernel; one launch is made at least."""


@dataclass(frozen=True)
class Side:
    """One side's kernels, set up."""

    planned: Planned
    cells: list[Cell]

    @classmethod
    def begin(cls, options: Mapping[str, Any]) -> Side:
        """Set up; HarnessError where the options name several backends or take too much memory."""
        planned = plan(Asked(**options))
        require_memory(planned.problems, planned.device)
        (backend,) = planned.backends
        cells = [Cell(problem, backend) for problem in planned.problems]
        for cell in cells:
            cell.attempt(partial(cell.set_up, planned.device, ROUND_S))
        return cls(planned, cells)

    def turn(self) -> dict[str, float]:
        """Seconds of a call of each kernel that can be timed, by name and mode."""
        for cell in self.cells:
            cell.attempt(cell.one_round)
        return {
            f"{_name(cell)}, {mode}": rounds[-1]
            for cell in self.cells
            if not cell.note
            for mode, rounds in cell.rounds.items()
        }

    def describe(self) -> dict[str, Any]:
        """What ran, where, and what of it was wrong or refused."""
        wrong = [f"{_name(each)}: {_fault(each)}" for each in self.cells if _fault(each)]
        notes = {_name(each): each.note for each in self.cells if each.note and not each.raised}
        device = self.planned.device
        facts = {"system": provenance.system(device), "software": provenance.software()}
        return facts | {"dtype": str(self.planned.dtype), "wrong": wrong, "refused": notes}


def _name(cell: Cell) -> str:
    return f"{cell.problem.operation} {cell.problem.name}"


def _fault(cell: Cell) -> str:
    """Why the cell's result is wrong; empty where it is not."""
    if cell.raised:
        return cell.note
    if cell.check is None or cell.check.correct:
        return ""
    return f"off by {cell.check.error:.3g}, at most {cell.check.limit:.3g}"


def serve(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """An answer a line; {"error": ...} where it could not be done."""
    sides: dict[str, Side] = {}
    for line in lines:
        asked = json.loads(line)
        try:
            if "begin" in asked:
                sides.clear()
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                sides |= {name: Side.begin(options) for name, options in asked["begin"].items()}
                yield {name: side.describe() for name, side in sides.items()}
            else:
                yield sides[asked["turn"]].turn()
        except (BackbenchError, TypeError) as error:  # TypeError: options that this version does not know
            yield {"error": " ".join(str(error).split())}


def main() -> None:
    """Serve stdin; whatever a library prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for answer in serve(iter(sys.stdin)):
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
