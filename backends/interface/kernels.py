"""Kernels that a backend compiles itself: what the ahead-of-time check and a fault's advice need of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


class KernelLaunch(Protocol):
    """One launch of one Triton kernel, as the backend starts it."""

    @property
    def kernel(self) -> Any:
        """The `triton.jit` function."""

    @property
    def arguments(self) -> Sequence[Any]:
        """In the kernel's order, those that are not `tl.constexpr`; tensors may be on the meta device."""

    @property
    def constants(self) -> Mapping[str, Any]:
        """`tl.constexpr` argument -> value."""

    @property
    def options(self) -> Mapping[str, Any]:
        """What the compiler is told besides: num_warps, maxnreg, ..."""


@dataclass(frozen=True)
class KernelCase:
    """One kernel as one launch configuration of it, on any target."""

    kernel: str
    """Like "attention/decode"; unique together with `variant`."""
    variant: str
    """The dtype and what else tells its launches apart, like "bf16 block64 head128 group4"."""
    matrix: bool
    """True when the kernel's work is a matrix product, so that plain multiply-adds are a fault."""
    launch: Callable[[str], KernelLaunch]
    """The launch on a target of `backends.aot.compile.TARGETS`."""
    refuses: Callable[[str], list[str]] = field(default=lambda target: [])
    """Why the backend would not launch it on a target; empty = it would."""
    targets: tuple[str, ...] = ()
    """Targets it is compiled for; empty = all."""


@dataclass(frozen=True)
class Kernels:
    """A backend's own kernels. Nothing of them is imported until it is asked for."""

    cases: Callable[[], list[KernelCase]]
    """What `bench portability` compiles; imports the kernels."""
    baseline: Path
    """The best seen of every row, which `bench portability --update` writes."""
    operations: Mapping[str, str]
    """Module of a kernel -> "attention", "linear" or "operations": what another backend can serve instead."""
