"""Matrix multiplication by a weight in its canonical layout, and what an implementation must offer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from backbench.backends.interface.device import Device
from backbench.errors import BackendError


@dataclass(frozen=True)
class Scheme:
    """How a weight is stored. The default is a dense weight in the model's dtype."""

    weight: str = "dense"
    group: int | None = None
    zero_point: bool = False
    activation: str | None = None
    sparse_2_4: bool = False


@dataclass(frozen=True)
class WeightSpec:
    """One linear of a model, as a backend is asked for it: for every role, before any weight is loaded."""

    role: str
    """"qkv", "attention_output", "gate_up", "down" or "head"."""
    n: int
    """Output features."""
    k: int
    """Input features."""
    scheme: Scheme
    dtype: torch.dtype
    """Of activations, and of a dense weight."""


@dataclass
class Weight:
    """A linear weight in the canonical layout every checkpoint format becomes before packing."""

    scheme: Scheme
    q: Tensor
    """[N, K]: output features by input features."""
    scale: Tensor | None = None
    zero: Tensor | None = None

    def tensors(self) -> tuple[Tensor, ...]:
        """What it is stored as."""
        return tuple(each for each in (self.q, self.scale, self.zero) if each is not None)

    @property
    def num_bytes(self) -> int:
        """Device bytes, scales and zero points included."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def spec(self, role: str) -> WeightSpec:
        """What a backend is asked of it, with activations in the dtype it is stored in, as for dense ones."""
        n, k = self.q.shape
        return WeightSpec(role, n, k, self.scheme, self.q.dtype)

    def shard(self, dim: int, rank: int, world: int) -> Weight:
        """The `rank`-th of `world` equal parts along `dim` (0 = output features, 1 = input features)."""
        size = self.q.shape[dim]
        if size % world:
            raise BackendError(f"A weight of {size} features cannot be split into {world} equal parts.")
        if self.scheme.weight != "dense":
            raise BackendError(f"Sharding {self.scheme.weight} weights is not implemented.")
        return Weight(self.scheme, self.q.chunk(world, dim)[rank].contiguous())


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
