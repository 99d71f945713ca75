"""Matrix multiplication by a weight, and what an implementation must offer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from backbench.backends.interface.device import Device
from backbench.backends.interface.weight import Scheme, Weight, WeightSpec


@dataclass(frozen=True)
class RoundedRows:
    """Rows [M, K] in codes, as a quantized weight's scheme rounds them: a number is code * scale."""

    codes: Tensor
    """int8 or float8_e4m3fn [M, K]."""
    scale: Tensor
    """f32 [M], or [M, groups]."""
    dtype: torch.dtype
    """Of the numbers that were rounded, and of a product by them."""

    @property
    def shape(self) -> torch.Size:
        """[M, K]."""
        return self.codes.shape


@dataclass(frozen=True)
class Crossover:
    """Where products by a quantized or sparse weight stop being faster than by the dense one, as measured."""

    faster_up_to: int
    """Rows of the largest bucket of which it and all smaller ones that were timed are faster; 0 = of none."""
    slower_from: int | None
    """Rows of the smallest timed bucket that is not; None = all that were timed are faster."""
    beyond: str | None = None
    """What serves from there on."""


class Linear(ABC):
    """A named matrix-multiplication implementation."""

    name: str

    @abstractmethod
    def refusals(self, spec: WeightSpec, device: Device) -> list[str]:
        """Reasons this cannot serve `spec` on `device`; empty = it can."""

    @abstractmethod
    def pack(self, weight: Weight, device: Device) -> Any:
        """The weight in this backend's own layout (opaque)."""

    @abstractmethod
    def run(self, x: Tensor, packed: Any, bias: Tensor | None = None) -> Tensor:
        """x [M, K] times the weight's transpose, plus bias [N]: [M, N] in x's dtype."""

    def rounding(self, packed: Any) -> str | None:
        """The activation (`quantization.ACTIVATIONS`) as which `run_rounded` takes rows; None = none."""
        return None

    def run_rounded(self, rows: RoundedRows, packed: Any, bias: Tensor | None = None) -> Tensor:
        """As `run`, of rows that whoever made them has rounded as `rounding` says."""
        raise NotImplementedError(f"{self.name} linear rounds rows itself.")

    def unpack(self, packed: Any) -> Weight | None:
        """The weight as `pack` was given it; None = it cannot be had back, and the caller keeps it."""
        return None

    def take(self, held: PackedWeight, device: Device) -> Any:
        """The packed form of a weight that some implementation, perhaps this one, has packed before."""
        return held.packed if held.linear is self else self.pack(held.canonical(), device)

    def served_by(self, spec: WeightSpec, device: Device) -> str:
        """What computes the product: this implementation's name, or more exactly the way it takes."""
        return self.name

    def tuning(self, spec: WeightSpec, device: Device) -> dict[str, str | None] | None:
        """Shape -> why the weight runs on a written default there, as `Attention.tuning`."""
        return None

    def crossover(self, spec: WeightSpec, device: Device) -> Crossover | None:
        """Up to how many rows a quantized or sparse weight is worth having; None = nobody measured."""
        return None


@dataclass(frozen=True)
class PackedWeight:
    """A quantized weight as one implementation holds it, so that no second copy has to stay beside it."""

    linear: Linear
    packed: Any
    scheme: Scheme
    kept: Weight | None
    """The canonical weight, where `linear` cannot give it back."""

    @classmethod
    def of(cls, linear: Linear, weight: Weight, device: Device) -> PackedWeight:
        """`weight` packed by `linear`, which the caller gives up."""
        packed = linear.pack(weight, device)
        return cls(linear, packed, weight.scheme, weight if linear.unpack(packed) is None else None)

    def canonical(self) -> Weight:
        """The weight in the canonical layout, perhaps a copy; let go of it soon."""
        found = self.linear.unpack(self.packed) if self.kept is None else self.kept
        assert found is not None
        return found

    def tensors(self, read: bool = False) -> Iterator[Tensor]:
        """What is held: the packed form's tensors, wherever it keeps them, and those of a weight kept.

        read: only what a product reads, which is the packed form, or what its own `tensors(read)` says.
        """
        yield from _tensors(self.packed if read else (self.packed, self.kept), read)


def _tensors(value: Any, read: bool) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif callable(own := getattr(value, "tensors", None)):
        yield from own(read)
    elif is_dataclass(value) and not isinstance(value, type):
        for each in fields(value):
            yield from _tensors(getattr(value, each.name), read)
    elif isinstance(value, Mapping):
        yield from _tensors(value.values(), read)
    elif isinstance(value, Iterable) and not isinstance(value, str | bytes):
        for each in value:
            yield from _tensors(each, read)
