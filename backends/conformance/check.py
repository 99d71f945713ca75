"""Put a whole backend through its cases."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice

import torch

from backbench.backends import registry
from backbench.backends.conformance.attention_cases import full_cases, quick_cases
from backbench.backends.conformance.attention_check import AttentionChecker
from backbench.backends.conformance.linear_check import LinearChecker, linear_cases
from backbench.backends.conformance.matrix import CheckRow, ConformanceMatrix, Status
from backbench.backends.conformance.operation_check import OperationChecker, operation_cases
from backbench.backends.conformance.sampling_check import sampling_cases
from backbench.backends.interface import Attention, Backend, Device, Linear, Operations
from backbench.errors import BackendError

LEVELS = ("quick", "full")
Job = Callable[[], CheckRow]
OnRow = Callable[[CheckRow, int], None]
"""Hears of a case's row, and of the number of cases."""


def check(
    name: str,
    device: Device,
    *,
    level: str = "quick",
    dtypes: Iterable[torch.dtype] | None = None,
    share: tuple[int, int] = (0, 1),
    on_row: OnRow = lambda row, total: None,
) -> ConformanceMatrix:
    """The conformance matrix of the backend called `name` on `device`.

    `level` is "quick" (seconds, also in Triton's interpreter) or "full" (every combination). `dtypes`
    defaults to what the device is used with: bf16, fp16 and fp32, on a CPU at "quick" fp32 and bf16, in
    Triton's interpreter fp32 and fp16 (its bf16 matrix product is wrong). `share` (i, n) checks only cases
    i, i + n, i + 2n, ..., so that n processes can divide the work. `on_row` hears of each case as it ends,
    and of how many there are.

    Raises:
        BackendError: the backend or the level does not exist.
    """
    return check_backend(registry.load(name), device, level=level, dtypes=dtypes, share=share, on_row=on_row)


def check_backend(
    backend: Backend,
    device: Device,
    *,
    level: str = "quick",
    dtypes: Iterable[torch.dtype] | None = None,
    share: tuple[int, int] = (0, 1),
    on_row: OnRow = lambda row, total: None,
) -> ConformanceMatrix:
    """As `check`, for a Backend at hand."""
    if level not in LEVELS:
        raise BackendError(f"Unknown conformance level {level!r}; use quick or full.")
    chosen = tuple(dtypes) if dtypes is not None else default_dtypes(device, level)
    jobs = list(islice(_jobs(backend, device, level, chosen), share[0], None, share[1]))
    rows = []
    for job in jobs:
        rows.append(job())
        on_row(rows[-1], len(jobs))
    return ConformanceMatrix(backend.name, device.name, device.arch, level, tuple(rows))


def default_dtypes(device: Device, level: str) -> tuple[torch.dtype, ...]:
    """The dtypes a device is checked with when none are named."""
    if device.interpret:
        return (torch.float32, torch.float16)
    if device.vendor == "cpu" and level == "quick":
        return (torch.float32, torch.bfloat16)
    return (torch.bfloat16, torch.float16, torch.float32)


def _jobs(backend: Backend, device: Device, level: str, dtypes: Sequence[torch.dtype]) -> Iterator[Job]:
    torch_backend = registry.load("torch")
    attention, linear, operations = torch_backend.attention, torch_backend.linear, torch_backend.operations
    if attention is None or linear is None or operations is None:
        raise BackendError("The torch backend must offer every operation: the others are checked against it.")
    yield from _attention_jobs(backend, attention, operations, device, level, dtypes)
    yield from _linear_jobs(backend, linear, device, level, dtypes)
    yield from _operation_jobs(backend, operations, device, level, dtypes)


def _inherited(backend: Backend, operation: str) -> Job:
    return partial(CheckRow, operation, "all", "all", Status.INHERITED, f"served by {backend.base}")


def _attention_jobs(
    backend: Backend,
    reference: Attention,
    operations: Operations,
    device: Device,
    level: str,
    dtypes: Sequence[torch.dtype],
) -> Iterator[Job]:
    if backend.attention is None:
        yield _inherited(backend, "attention")
        return
    checker = AttentionChecker(backend.attention, operations, reference, device)
    for dtype in dtypes:
        quick = quick_cases(dtype, interpret=device.interpret)
        for case in quick if level == "quick" else full_cases(dtype):
            yield partial(checker.check, case)


def _linear_jobs(
    backend: Backend, reference: Linear, device: Device, level: str, dtypes: Sequence[torch.dtype]
) -> Iterator[Job]:
    if backend.linear is None:
        yield _inherited(backend, "linear")
        return
    checker = LinearChecker(backend.linear, reference, device)
    for dtype in dtypes:
        for case in linear_cases(level):
            yield partial(checker.check, case, dtype)


def _operation_jobs(
    backend: Backend, reference: Operations, device: Device, level: str, dtypes: Sequence[torch.dtype]
) -> Iterator[Job]:
    if backend.operations is None:
        yield _inherited(backend, "operations")
        return
    checker = OperationChecker(backend.operations, reference, device)
    for dtype in dtypes:
        for case in operation_cases(level, sorted(backend.operations.roundings)):
            yield partial(checker.check, case, dtype)
        for draws in sampling_cases(level):
            yield partial(checker.check, draws, dtype)
