"""Put each problem to each backend."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from backbench.backends.interface import Backend, Device
from backbench.errors import BackendError
from backbench.harness.kernels.problem import Prepared, Problem
from backbench.harness.kernels.timing import Timing, time_eager, time_graph
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


def measure(
    problems: Iterable[Problem],
    backends: Sequence[Backend],
    device: Device,
    peaks: Peaks,
    *,
    budget_s: float = 0.02,
    progress: Callable[[str], None] = lambda text: None,
) -> Iterator[KernelResult]:
    """Every problem on every backend; `budget_s` is the measuring time of one cell."""
    for problem in problems:
        for backend in backends:
            progress(f"{problem.name} on {backend.name}")
            yield from _cell(problem, backend, device, peaks, budget_s)


def _cell(
    problem: Problem, backend: Backend, device: Device, peaks: Peaks, budget_s: float
) -> Iterator[KernelResult]:
    nothing = KernelResult(
        problem.operation, problem.name, problem.dtype, backend.name, "", problem.bytes, problem.flops
    )
    try:
        yield from _timed(nothing, problem, backend, device, peaks, budget_s)
    except BackendError as error:
        yield replace(nothing, note=str(error))
    except Exception as error:  # one library's fault must not cost the other cells; it counts as wrong
        first = (str(error).splitlines() or [""])[0]
        yield replace(nothing, correct=False, note=f"raised {type(error).__name__}: {first[:200]}")


def _timed(
    nothing: KernelResult,
    problem: Problem,
    backend: Backend,
    device: Device,
    peaks: Peaks,
    budget_s: float,
) -> Iterator[KernelResult]:
    """The eager time, and the one in a graph where the calls can be captured."""
    prepared = problem.prepare(backend, device)
    if not isinstance(prepared, Prepared):
        yield replace(nothing, note="; ".join(prepared))
        return
    check = prepared.check
    measured = replace(
        nothing,
        roofline_s=roofline_s(problem, peaks),
        error=check.error,
        limit=check.limit,
        correct=check.correct,
    )
    yield replace(measured, mode="eager", timing=time_eager(prepared.calls, device, budget_s))
    if device.torch_device.type == "cuda" and prepared.capturable:
        yield replace(measured, mode="graph", timing=time_graph(prepared.calls, device, budget_s))


def roofline_s(problem: Problem, peaks: Peaks) -> float | None:
    """The longer of moving the bytes and the arithmetic, at the measured peaks (Williams et al. 2009)."""
    if not peaks.measured_bytes_per_s or not peaks.measured_flops_per_s:
        return None
    return max(problem.bytes / peaks.measured_bytes_per_s, problem.flops / peaks.measured_flops_per_s)
