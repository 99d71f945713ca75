"""Launching one compiled kernel again and again without Triton's per-launch binding.

Triton binds, specialises and hashes every argument of every launch, each layer, each step that is not in
a graph. A `BoundKernel` has its compile-time arguments fixed and looks only at what can still choose
another binary: for the attention kernels' thirty arguments that halves the time spent in Python (14 to 6 us).
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import triton
from torch import Tensor

from backbench.errors import BackendError

INT32_MAX = 2**31 - 1


class BoundKernel:
    """`kernel` with fixed `tl.constexpr` arguments and launch options, for one device."""

    def __init__(self, kernel: Any, **keywords: Any) -> None:
        """Args: keywords: every `tl.constexpr` argument, and options such as num_warps.

        Raises:
            BackendError: the kernel's constexpr arguments do not come last, or one is missing.
        """
        self._kernel = kernel
        self._keywords = keywords
        self._compiled: dict[Hashable, Any] = {}
        self._constants: tuple[Any, ...] = ()
        if isinstance(kernel, triton.runtime.JITFunction):
            self._constants = self._constants_in_order()

    def _constants_in_order(self) -> tuple[Any, ...]:
        parameters = list(self._kernel.params)
        constants = [parameter.name for parameter in parameters if parameter.is_constexpr]
        if constants != [parameter.name for parameter in parameters[len(parameters) - len(constants) :]]:
            raise BackendError(f"{self._kernel.__name__}: constexpr arguments must come last.")
        if missing := [name for name in constants if name not in self._keywords]:
            raise BackendError(f"{self._kernel.__name__}: give {', '.join(missing)} when binding it.")
        return tuple(self._keywords[name] for name in constants)

    def __call__(self, grid: tuple[int, int, int], *arguments: Any) -> None:
        """Launch on the current stream; compiles at the first launch with arguments of this kind."""
        kind = tuple(map(argument_kind, arguments))
        compiled = self._compiled.get(kind)
        if compiled is not None:
            compiled[grid](*arguments, *self._constants)
            return
        compiled = self._kernel[grid](*arguments, **self._keywords)
        if self._constants:  # the interpreter compiles nothing
            self._compiled[kind] = compiled


def argument_kind(argument: Any) -> Hashable:
    """What Triton specialises on: a tensor's type and alignment, an integer's width and divisibility."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, argument > INT32_MAX
    return type(argument).__name__
