"""One measured problem: what has to move and be computed, and how a backend sets it up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from backbench.backends.interface import Backend, Device

COLD_BYTES = {"cpu": 128 * 2**20, "gpu": 400 * 2**20}
"""What the rotating calls read together: several times the last cache, so that every call reads memory."""
MAX_CALLS = 32


@dataclass(frozen=True)
class Check:
    """A result against the fp64 oracle, over the part that was compared."""

    error: float
    """Largest absolute error."""
    limit: float
    """Eight roundings of the largest output."""

    @property
    def correct(self) -> bool:
        return self.error <= self.limit


@dataclass(frozen=True)
class Prepared:
    """One backend's calls for a problem, each on buffers of its own."""

    calls: Sequence[Callable[[], Any]]
    check: Check
    capturable: bool
    """Whether the calls may be captured in a device graph."""


@dataclass(frozen=True)
class Problem:
    """One operation at one shape."""

    operation: str
    """"attention", "linear" or "operations"."""
    name: str
    dtype: str
    bytes: int
    """Bytes that must be read or written at least once."""
    flops: int
    prepare: Callable[[Backend, Device], Prepared | list[str]]
    """Sets the problem up, or gives the reasons the backend cannot serve it."""
    peak_known: bool = True
    """Whether the measured peak is of its arithmetic: rows rounded to int8 or fp8 have another one."""


def rotations(device: Device, bytes_per_call: int) -> int:
    """How many copies of a problem make its data cold: between 2 and `MAX_CALLS`."""
    cold = COLD_BYTES["cpu" if device.torch_device.type == "cpu" else "gpu"]
    return min(MAX_CALLS, max(2, -(-cold // bytes_per_call)))


def setup_bytes(problem: Problem, device: Device) -> int:
    """About what one backend's buffers for `problem` take, its cold copies included."""
    return problem.bytes * rotations(device, problem.bytes)


def free_bytes(device: Device) -> int:
    """Memory the device has left."""
    if device.torch_device.type == "cuda":
        return int(torch.cuda.mem_get_info(device.torch_device)[0])
    return int(psutil.virtual_memory().available)
