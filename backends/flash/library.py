"""What every library of the family has in common: is it there, does it fit, does it take our calls."""

from __future__ import annotations

import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from backends.interface import AttentionRunner, AttentionSpec, BackendError, Batch, Device
from backends.torch.attention import TorchRunner


class Library(ABC):
    """One installable library."""

    key: str
    """The pin: `flash:KEY`."""
    distribution: str
    """Its name on PyPI."""
    checked_version: str
    """The release whose signatures our calls are checked against."""
    vendor: str = "nvidia"
    arches: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)
    max_head_dim = 256

    def version(self) -> str | None:
        """The installed version; None = not installed. Nothing is imported."""
        try:
            return version(self.distribution)
        except PackageNotFoundError:
            return None

    def label(self) -> str:
        """Library and version, for the record."""
        return f"{self.key}, {self.distribution} {self.version()}"

    def made_for(self, device: Device) -> bool:
        """Whether the library has kernels for this architecture."""
        return device.vendor == self.vendor and device.arch in self.arches

    def absent(self, device: Device) -> list[str]:
        """Reasons the library cannot be used on `device` at all."""
        if not self.made_for(device):
            return [f"needs {' or '.join(self.arches)}, this is {device.arch}"]
        reasons = []
        if self.version() is None:
            reasons.append(f"not installed (pip install {self.distribution}=={self.checked_version})")
        return reasons

    def reasons(self, spec: AttentionSpec, device: Device) -> list[str]:
        """Reasons it cannot serve `spec` on `device`; empty = it can."""
        reasons = self.absent(device)
        if not self.made_for(device):
            return reasons
        if spec.dtype not in self.dtypes:
            names = " or ".join(str(dtype) for dtype in self.dtypes)
            reasons.append(f"dtype {spec.dtype} is not {names}")
        if spec.kv_dtype != spec.dtype:
            reasons.append(f"the KV cache must have the model's dtype {spec.dtype}, not {spec.kv_dtype}")
        if spec.head_dim % 8 or spec.head_dim > self.max_head_dim:
            reasons.append(f"head_dim {spec.head_dim} is no multiple of 8 up to {self.max_head_dim}")
        if spec.q_heads % spec.kv_heads:
            reasons.append(f"{spec.q_heads} query heads do not divide among {spec.kv_heads} KV heads")
        return reasons + self.limits(spec, device)

    def limits(self, spec: AttentionSpec, device: Device) -> list[str]:
        """Reasons of this library's own."""
        return []

    @abstractmethod
    def open(self, spec: AttentionSpec, device: Device) -> AttentionRunner:
        """A runner; the library is imported now."""

    def function(self, module: str, name: str, keywords: Sequence[str]) -> Callable[..., Any]:
        """`module.name`, after making sure that it takes every keyword we pass.

        Raises:
            BackendError: the import fails, or the installed version's signature is another.
        """
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise BackendError(
                f"{self.distribution} {self.version()} cannot be used: {error}; reinstall it."
            ) from error
        missing = sorted(set(keywords) - set(inspect.signature(found).parameters))
        if missing:
            raise BackendError(
                f"{self.distribution} {self.version()}: {name} takes no {', '.join(missing)}; "
                f"install {self.distribution}=={self.checked_version}."
            )
        checked: Callable[..., Any] = found
        return checked


class FlashRunner(TorchRunner):
    """A runner on the torch backend's cache, or on any other with `blocks()`; subclasses compute."""

    batch_invariant = False

    @property
    def window_left(self) -> int:
        """The family's left window: keys before the query's own position; -1 = all."""
        return -1 if self.spec.window is None else self.spec.window - 1


def rest_starts(batch: Batch) -> Tensor:
    """i32[rows + 1]: where each sequence after the decodes starts, counted from the first of them."""
    decodes = batch.num_decodes
    starts = batch.query_start[decodes : batch.num_seqs + 1]
    return starts - decodes if decodes else starts
