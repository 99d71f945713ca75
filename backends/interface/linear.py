"""Matrix multiplication by a weight, and what an implementation must offer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from backbench.backends.interface.device import Device
from backbench.backends.interface.weight import Weight, WeightSpec


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

    def tuning(self, spec: WeightSpec, device: Device) -> dict[str, str | None] | None:
        """Shape -> why the weight runs on a written default there, as `Attention.tuning`."""
        return None
