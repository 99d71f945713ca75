"""What a backend with tunable launches offers to `bench tune`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from backbench.backends.interface.attention import AttentionSpec
from backbench.backends.interface.device import Device
from backbench.backends.interface.weight import Scheme

Config = Mapping[str, Any]
"""A launch: tile sizes, warps, stages."""


class Problem(ABC):
    """One bucket of shapes of one operation, and how to run it with a given launch."""

    operation: str
    bucket: str
    dtype: str
    sources: str
    tolerance: float
    """Relative error in norm, from which on a result counts as wrong."""

    def sources_of(self, config: Config | None) -> str:
        """The hash of the kernels such a launch runs: an entry that carries another no longer holds."""
        return self.sources

    @abstractmethod
    def baseline(self) -> Config | None:
        """What serves where nothing was tuned; None = the vendor's library."""

    @abstractmethod
    def candidates(self) -> Sequence[Config]:
        """Launches worth trying."""

    @abstractmethod
    def error(self, config: Config) -> float:
        """Relative error in norm of the result against fp32; raises where the launch is impossible."""

    @abstractmethod
    def times_us(self, config: Config | None) -> Sequence[float]:
        """Microseconds of one call for each representative shape, in a graph and with cold caches."""

    def dense_us(self) -> float | None:
        """Of a product by a quantized or sparse weight: what the fastest by the dense one takes, timed alike;
        None = it is no such product."""
        return None

    @abstractmethod
    def compile(self, config: Config) -> None:
        """Compile the launch into Triton's cache on disk, touching little memory (in another process)."""


class Tuner(ABC):
    """What a backend with tunable launches offers to `bench tune`."""

    @abstractmethod
    def file(self, device: Device) -> Path:
        """Where the backend reads the device's table."""

    @abstractmethod
    def products(
        self,
        weights: Sequence[tuple[int, int]],
        dtype: torch.dtype,
        device: Device,
        schemes: Sequence[Scheme] = (Scheme(),),
    ) -> Iterator[Problem]:
        """Every bucket of products by `weights` [n, k] in each scheme, each once."""

    @abstractmethod
    def attention(self, specs: Sequence[AttentionSpec], device: Device) -> Iterator[Problem]:
        """Every bucket of attention layers, each once."""
