"""What every library of the family has in common: is it there, does it fit."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from backbench.backends.dependency import Release
from backbench.backends.interface import AttentionRunner, AttentionSpec, Batch, Device
from backbench.backends.torch.attention import TorchRunner


class Library(ABC):
    """One installable library."""

    key: str
    """The pin: `flash:KEY`."""
    release: Release
    vendor: str = "nvidia"
    arches: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)
    max_head_dim = 256

    def label(self) -> str:
        """Library and version, for the record."""
        return f"{self.key}, {self.release.label()}"

    def made_for(self, device: Device) -> bool:
        """Whether the library has kernels for this architecture."""
        return device.vendor == self.vendor and device.arch in self.arches

    def absent(self, device: Device) -> list[str]:
        """Reasons the library cannot be used on `device` at all."""
        if not self.made_for(device):
            return [f"needs {' or '.join(self.arches)}, this is {device.arch}"]
        return self.release.absent()

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
