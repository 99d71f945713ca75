"""Checkpoint formats: each is one file of this folder, which loads weights into the canonical layout.

A file exports `FORMAT = SomeFormat()`. What comes of it is the same whatever the file held: `Weight`s, of
which `Weight.shard` along `TensorSpec.shard_axis` gives a device's part, and which backends pack.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from pathlib import Path

import torch

from backbench.engine.models.layers import ModelSpec
from backbench.engine.models.weights import Weights
from backbench.errors import EngineError


class WeightFormat(ABC):
    """One way to keep weights in a directory."""

    holds: str
    """What a directory of this format has in it, as a message says it."""

    @abstractmethod
    def recognises(self, folder: Path) -> bool:
        """True where `folder` holds weights of this format; nothing of them is read."""

    @abstractmethod
    def names(self, folder: Path) -> frozenset[str]:
        """The tensors that are stored. Raises EngineError where the directory contradicts itself."""

    @abstractmethod
    def differ(self, folder: Path, one: str, other: str) -> bool:
        """True where the two stored tensors are not the same numbers."""

    @abstractmethod
    def load(self, folder: Path, spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> Weights:
        """All weights on `device` in the canonical layout, dense ones in `dtype`.

        Raises:
            EngineError: a tensor is missing, malformed, or not finite; it is named.
        """


def format_of(folder: Path) -> WeightFormat | None:
    """The format of the weights in `folder`; None = it holds none."""
    return next((each for each in formats() if each.recognises(folder)), None)


def require_format(folder: Path) -> WeightFormat:
    """As `format_of`; raises EngineError where it holds none."""
    found = format_of(folder)
    if found is None:
        known = "; ".join(each.holds for each in formats())
        raise EngineError(f"{folder} holds no weights that are served: {known}.")
    return found


def formats() -> list[WeightFormat]:
    """Every format, from the files of this folder."""
    modules = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return [importlib.import_module(f"{__name__}.{module}").FORMAT for module in modules]
