"""Put each problem to each backend."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from backbench.backends.interface import Backend, Device
from backbench.errors import BackendError
from backbench.harness.kernels.problem import Check, Prepared, Problem, free_bytes, setup_bytes
from backbench.harness.kernels.timing import (
    ROUNDS,
    Stopwatch,
    Timing,
    eager_stopwatch,
    graph_stopwatch,
    summary,
)
from backbench.reports.metrics.roofline import Peaks


@dataclass(frozen=True)
class KernelResult:
    """One problem on one backend, eagerly or in a graph; or why there is no time."""

    operation: str
    problem: str
    dtype: str
    backend: str
    mode: str
    """"eager" or "graph"; "" where the backend cannot serve the problem."""
    bytes: int
    flops: int
    timing: Timing | None = None
    roofline_s: float | None = None
    """The least time that the measured peaks allow."""
    error: float | None = None
    limit: float | None = None
    correct: bool | None = None
    note: str = ""

    @property
    def bytes_per_s(self) -> float | None:
        return self.bytes / self.timing.median_s if self.timing else None

    @property
    def flops_per_s(self) -> float | None:
        return self.flops / self.timing.median_s if self.timing else None

    @property
    def roofline_share(self) -> float | None:
        """The least possible time over the measured one."""
        return self.roofline_s / self.timing.median_s if self.timing and self.roofline_s else None

    def to_json(self) -> dict[str, Any]:
        """Flat plain values: one row of the JSON and CSV files."""
        flat = asdict(self)
        timing = flat.pop("timing") or {}
        empty = {"median_s": None, "low_s": None, "high_s": None, "rounds": None}
        derived = ("bytes_per_s", "flops_per_s", "roofline_share")
        return flat | empty | timing | {name: getattr(self, name) for name in derived}


PASSES = 2
"""Times that every problem is set up and measured: once early in the call, once late."""


def measure(
    problems: Iterable[Problem],
    backends: Sequence[Backend],
    device: Device,
    peaks: Peaks,
    *,
    budget_s: float = 0.02,
    progress: Callable[[str], None] = lambda text: None,
) -> Iterator[KernelResult]:
    """Every problem on every backend; `budget_s` is the measuring time of one cell, all rounds together.

    What is compared takes turns: a problem's backends are measured A B B A A B B A, and the whole list a
    second time from its end, so that a drift of the machine meets all of them, and shows in the intervals.
    """
    problems = list(problems)
    cells = [[Cell(problem, backend) for backend in backends] for problem in problems]
    for turn in range(PASSES):
        for row in reversed(cells) if turn % 2 else cells:
            names = ", ".join(cell.backend.name for cell in row)
            progress(f"Pass {turn + 1} of {PASSES}: {row[0].problem.name} on {names}")
            for group in _fitting(row[::-1] if turn % 2 else row, device):
                _take_turns(group, device, budget_s / ROUNDS)
    for row in cells:
        for cell in row:
            yield from cell.results(peaks)


class Cell:
    """One problem on one backend: what its rounds gave, eagerly and in a graph."""

    def __init__(self, problem: Problem, backend: Backend) -> None:
        self.problem = problem
        self.backend = backend
        self.note = ""
        self.raised = False
        self.check: Check | None = None
        self.rounds: dict[str, list[float]] = {}
        self._stopwatches: dict[str, Stopwatch] = {}

    def attempt(self, action: Callable[[], None]) -> None:
        """Do it unless this cell failed before; one library's fault must not cost the other cells."""
        if self.note:
            return
        try:
            action()
        except BackendError as error:
            self.note = str(error)
        except Exception as error:  # counts as wrong
            first = (str(error).splitlines() or [""])[0]
            self.note, self.raised = f"raised {type(error).__name__}: {first[:200]}", True

    def set_up(self, device: Device, round_s: float) -> None:
        """Fill buffers, compare with the oracle, and launch for the first time."""
        prepared = self.problem.prepare(self.backend, device)
        if not isinstance(prepared, Prepared):
            self.note = "; ".join(prepared)
            return
        if self.check is None or prepared.check.error > self.check.error:
            self.check = prepared.check
        self._stopwatches["eager"] = eager_stopwatch(prepared.calls, device, round_s)
        if device.torch_device.type == "cuda" and prepared.capturable:
            self._stopwatches["graph"] = graph_stopwatch(prepared.calls, device, round_s)

    def one_round(self) -> None:
        """Of each mode."""
        for mode, stopwatch in self._stopwatches.items():
            self.rounds.setdefault(mode, []).append(stopwatch.round())

    def release(self) -> None:
        """Give the buffers back."""
        self._stopwatches.clear()

    def results(self, peaks: Peaks) -> Iterator[KernelResult]:
        """One result a mode; one without a time where the cell failed or cannot be served."""
        problem = self.problem
        nothing = KernelResult(
            problem.operation,
            problem.name,
            problem.dtype,
            self.backend.name,
            "",
            problem.bytes,
            problem.flops,
        )
        if self.note or self.check is None:
            yield replace(nothing, note=self.note, correct=False if self.raised else None)
            return
        for mode, rounds in self.rounds.items():
            yield replace(
                nothing,
                mode=mode,
                timing=summary(rounds),
                roofline_s=roofline_s(problem, peaks),
                error=self.check.error,
                limit=self.check.limit,
                correct=self.check.correct,
            )


def _take_turns(cells: Sequence[Cell], device: Device, round_s: float) -> None:
    for cell in cells:
        cell.attempt(partial(cell.set_up, device, round_s))
    for index in range(ROUNDS // PASSES):
        # A B B A: a steady drift adds the same to each.
        for cell in cells if index % 4 in (0, 3) else reversed(cells):
            cell.attempt(cell.one_round)
    for cell in cells:
        cell.release()
    if device.torch_device.type == "cuda":
        torch.cuda.empty_cache()


def _fitting(cells: Sequence[Cell], device: Device) -> Iterator[Sequence[Cell]]:
    """Cells in groups whose buffers fit half of the free memory together; at least one by one."""
    size = max(1, free_bytes(device) // 2 // setup_bytes(cells[0].problem, device))
    for start in range(0, len(cells), size):
        yield cells[start : start + size]


def roofline_s(problem: Problem, peaks: Peaks) -> float | None:
    """The longer of moving the bytes and the arithmetic, at the measured peaks (Williams et al. 2009).

    The bytes alone where the peak is of another arithmetic.
    """
    if not peaks.measured_bytes_per_s or not peaks.measured_flops_per_s:
        return None
    if not problem.peak_known:
        return problem.bytes / peaks.measured_bytes_per_s
    return max(problem.bytes / peaks.measured_bytes_per_s, problem.flops / peaks.measured_flops_per_s)
