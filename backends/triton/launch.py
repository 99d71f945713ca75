"""How every Triton kernel here is launched: what a launch is, the GPU it is for, and how it starts.

A `Launch` is built by one function an operation. The backend starts it, the ahead-of-time check compiles it
for GPUs that are not there, and tests record it: how a kernel is launched is written once.

With programmatic dependent launch (NVIDIA sm90 and newer) a kernel starts while its predecessor drains:
each kernel first lets its successor start, does what depends on no other kernel (fetching weights), and
then waits until its predecessor has finished and its writes are visible. Because every kernel launched
this way waits before it reads or writes shared buffers, completion stays transitive along the stream.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from backbench.backends.interface import Device
from backbench.errors import BackendError

INT32_MAX = 2**31 - 1
CPU = "cpu"
"""The architecture of a `Place` where kernels run in the interpreter."""


@triton.jit
def release_successor(PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Let the next kernel in the stream start its prologue."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait_for_predecessor(PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Block until the previous kernel in the stream has finished and its writes are visible."""
    if PDL:
        gdc_wait()


class Place(NamedTuple):
    """The GPU that kernels are launched on, as far as their launches depend on it."""

    arch: str
    """ "sm90", "gfx942", ...; "cpu" where kernels run in the interpreter."""
    units: int
    """Streaming multiprocessors or compute units; 1 in the interpreter."""
    device: torch.device

    @classmethod
    def of(cls, device: Device) -> Place:
        """Where a backend for `device` launches."""
        if device.interpret:
            return cls(CPU, 1, device.torch_device)
        return cls(device.arch, device.units, device.torch_device)

    @property
    def interpreted(self) -> bool:
        """True where kernels run in the interpreter."""
        return self.arch == CPU

    @property
    def speaks_ptx(self) -> bool:
        """True where inline PTX assembles: compiled for an NVIDIA GPU."""
        return self.arch.startswith("sm")

    @property
    def overlaps(self) -> bool:
        """True where programmatic dependent launch exists: NVIDIA, compute capability 9.0 and newer."""
        return self.speaks_ptx and int(self.arch[2:]) >= 90

    def bind(self, kernel: Any, **keywords: Any) -> BoundKernel:
        """`kernel` with its compile-time arguments but PDL, and with launch options, for this GPU."""
        if self.overlaps:
            return BoundKernel(kernel, **keywords, PDL=True, launch_pdl=True)
        return BoundKernel(kernel, **keywords, PDL=False)


@lru_cache
def place_of(device: torch.device) -> Place:
    """The place that tensors on `device` are at."""
    return Place(*_facts(device), device)


def _facts(device: torch.device) -> tuple[str, int]:
    """(architecture, units)."""
    if device.type == "cpu":
        return CPU, 1
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0], properties.multi_processor_count
    return f"sm{properties.major}{properties.minor}", properties.multi_processor_count


class BoundKernel:
    """`kernel` with fixed `tl.constexpr` arguments and launch options, for one device.

    Triton binds, specialises and hashes every argument of every launch, each layer, each step that is not
    in a graph. This looks only at what can still choose another binary: for the attention kernels' thirty
    arguments that halves the time spent in Python (14 to 6 us).
    """

    def __init__(self, kernel: Any, **keywords: Any) -> None:
        """Args: keywords: every `tl.constexpr` argument, and options such as num_warps.

        Raises:
            BackendError: the kernel's constexpr arguments do not come last, or one is missing.
        """
        self.kernel = kernel
        self._keywords = keywords
        self._compiled: dict[Hashable, Any] = {}
        self._constants: tuple[Any, ...] = ()
        if isinstance(kernel, triton.runtime.JITFunction):
            self._constants = self._constants_in_order()

    def _constants_in_order(self) -> tuple[Any, ...]:
        parameters = list(self.kernel.params)
        constants = [parameter.name for parameter in parameters if parameter.is_constexpr]
        if constants != [parameter.name for parameter in parameters[len(parameters) - len(constants) :]]:
            raise BackendError(f"{self.kernel.__name__}: constexpr arguments must come last.")
        if missing := [name for name in constants if name not in self._keywords]:
            raise BackendError(f"{self.kernel.__name__}: give {', '.join(missing)} when binding it.")
        return tuple(self._keywords[name] for name in constants)

    @property
    def constants(self) -> dict[str, Any]:
        """The kernel's `tl.constexpr` arguments."""
        return {name: value for name, value in self._keywords.items() if name in self.kernel.arg_names}

    @property
    def options(self) -> dict[str, Any]:
        """What the compiler is told besides: num_warps, maxnreg, ..."""
        return {name: value for name, value in self._keywords.items() if name not in self.kernel.arg_names}

    def launch(self, grid: tuple[int, int, int], arguments: tuple[Any, ...]) -> Launch:
        """One launch of it."""
        return Launch(self, grid, arguments)

    def __call__(self, grid: tuple[int, int, int], *arguments: Any) -> None:
        """Launch on the current stream; compiles at the first launch with arguments of this kind."""
        kind = tuple(map(argument_kind, arguments))
        compiled = self._compiled.get(kind)
        if compiled is not None:
            compiled[grid](*arguments, *self._constants)
            return
        compiled = self.kernel[grid](*arguments, **self._keywords)
        if self._constants:  # the interpreter compiles nothing
            self._compiled[kind] = compiled


def argument_kind(argument: Any) -> Hashable:
    """What Triton specialises on: a tensor's type and alignment, an integer's width and divisibility."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, argument > INT32_MAX
    return type(argument).__name__


class Launch(NamedTuple):
    """One launch of one kernel, as it will run."""

    bound: BoundKernel
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]
    """In the kernel's order, those that are not `tl.constexpr`."""

    def start(self) -> None:
        """Launch on the current stream."""
        self.bound(self.grid, *self.arguments)

    @property
    def kernel(self) -> Any:
        """The `triton.jit` function."""
        return self.bound.kernel

    @property
    def constants(self) -> dict[str, Any]:
        """See `BoundKernel`."""
        return self.bound.constants

    @property
    def options(self) -> dict[str, Any]:
        """See `BoundKernel`."""
        return self.bound.options


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << max(number - 1, 0).bit_length()


def parts(number: int, size: int) -> int:
    """How many parts of `size` hold `number`."""
    return -(-number // size)
