"""What a call of `bench kernels` will cost, said before it costs it."""

from __future__ import annotations

from collections.abc import Sequence

from backbench.backends.interface import Device
from backbench.errors import HarnessError
from backbench.harness.kernels.measure import PASSES, roofline_s
from backbench.harness.kernels.problem import Problem, free_bytes, rotations, setup_bytes
from backbench.harness.kernels.timing import ROUNDS
from backbench.reports.metrics.roofline import Peaks

LONG_S = 60.0
LARGE_BYTES = 4 * 2**30
LAUNCHES = 2 * ROUNDS + 4 * PASSES
"""Of one cell: a round's and its warm-up, and each pass's set-up, check and first launches."""
CPU_SLOWDOWN = 4.0
"""A plain kernel on a CPU takes about this many times the roofline's time (torch's attention: 2 to 10)."""


def require_memory(problems: Sequence[Problem], device: Device) -> None:
    """HarnessError where a problem's buffers exceed the memory that is left."""
    free = free_bytes(device)
    for problem in problems:
        needed = setup_bytes(problem, device)
        if needed > free:
            raise HarnessError(
                f"{problem.name} needs about {needed / 2**30:.1f} GiB and {device.name} has "
                f"{free / 2**30:.1f} GiB free; choose smaller --shapes or a smaller --model."
            )


def warning(problems: Sequence[Problem], backends: int, device: Device, peaks: Peaks) -> str:
    """One line where a CPU will be busy for minutes or fill gigabytes; else empty."""
    if device.torch_device.type != "cpu" or not problems:
        return ""
    seconds = CPU_SLOWDOWN * sum(
        (roofline_s(problem, peaks) or 0.0) * rotations(device, problem.bytes) * LAUNCHES * backends
        for problem in problems
    )
    most = max(setup_bytes(problem, device) for problem in problems)
    if seconds < LONG_S and most < LARGE_BYTES:
        return ""
    costs = [f"{round(seconds / 60)} min"] if seconds >= LONG_S else []
    costs += [f"{most / 2**30:.1f} GiB"] if most >= LARGE_BYTES else []
    return (
        f"this takes about {' and '.join(costs)} on a CPU; smaller --shapes, fewer --tokens or --model tiny "
        "take less."
    )
