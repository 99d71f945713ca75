"""A backend as its module exports it, and what was chosen of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from backbench.backends.interface.attention import Attention, AttentionSpec
from backbench.backends.interface.collectives import Collectives
from backbench.backends.interface.device import Device
from backbench.backends.interface.kernels import Kernels
from backbench.backends.interface.linear import Linear, WeightSpec
from backbench.backends.interface.operations import Operations
from backbench.backends.interface.tuner import Tuner


@dataclass(frozen=True)
class Backend:
    """One backend as its module exports it: `BACKEND = Backend(...)`.

    An operation left None is served by the backend named `base`.
    """

    name: str
    summary: str
    attention: Attention | None = None
    linear: Linear | None = None
    operations: Operations | None = None
    collectives: Collectives | None = None
    base: str | None = "torch"
    variants: Mapping[str, Attention] = field(default_factory=dict)
    """Pin -> attention: `--backend NAME:PIN` takes that one and no other."""
    tuner: Tuner | None = None
    """What `bench tune` measures; None = its launches are not tuned."""
    kernels: Kernels | None = None
    """The Triton kernels it launches, which `bench portability` compiles; None = it has none."""


@dataclass(frozen=True)
class Selection:
    """What serves each operation in one engine, and how that came about."""

    asked: str
    device: Device
    attention: Attention
    linear: Linear
    operations: Operations
    passed_over: dict[str, Sequence[str]] = field(default_factory=dict)
    """Backends `auto` looked at and did not take, with the reasons."""
    spec: AttentionSpec | None = None
    """The model's first attention layer."""
    weights: Sequence[WeightSpec] = ()
    """The model's products, each once."""
    kernels: tuple[Kernels, ...] = ()
    """The Triton kernels of the backends that serve, each set once."""
    collectives: Collectives | None = None
    """Between several devices; None = there is one."""

    @property
    def used(self) -> dict[str, str]:
        """Operation -> name of the backend that serves it."""
        between = {} if self.collectives is None else {"collectives": self.collectives.name}
        return {
            "attention": self.attention.served_by(self.device, self.spec),
            "linear": self.linear.name,
            "operations": self.operations.name,
            **between,
        }
