"""Pick a library of the FlashAttention family, in a written order."""

from __future__ import annotations

from collections.abc import Sequence

from backbench.backends.flash.fa2 import FlashAttention2, FlashAttentionCk, FlashAttentionTritonAmd
from backbench.backends.flash.fa3 import FlashAttention3
from backbench.backends.flash.fa4 import FlashAttention4
from backbench.backends.flash.library import Library
from backbench.backends.interface import Attention, AttentionRunner, AttentionSpec, Device
from backbench.errors import BackendError

LIBRARIES: tuple[Library, ...] = (
    FlashAttention4(),
    FlashAttention3(),
    FlashAttention2(),
    FlashAttentionCk(),
    FlashAttentionTritonAmd(),
)
"""Newest first: the first one that is installed and serves the case is taken. FA4 comes before FA3
because it reads the paged cache itself; the released FA3 needs every key gathered first."""


class FlashAttention(Attention):
    """The first of `libraries` that serves the case."""

    cache_layout = "token rows"
    reads_layouts = ("head runs",)

    def __init__(self, libraries: Sequence[Library], pinned: bool = False) -> None:
        self.libraries = tuple(libraries)
        self.name = f"flash:{libraries[0].key}" if pinned else "flash"

    def served_by(self, device: Device, spec: AttentionSpec | None = None) -> str:
        present = [
            library
            for library in self.libraries
            if not (library.reasons(spec, device) if spec else library.absent(device))
        ]
        return f"{self.name} ({present[0].label()})" if present else self.name

    def refusals(self, spec: AttentionSpec, device: Device) -> list[str]:
        fitting = [library for library in self.libraries if library.made_for(device)]
        if not fitting and len(self.libraries) > 1:
            return [f"no library of the family has kernels for {device.arch}"]
        reasons = []
        for library in fitting or self.libraries:
            found = library.reasons(spec, device)
            if not found:
                return []
            reasons.append(f"{library.key}: {', '.join(found)}")
        return reasons

    def open(self, spec: AttentionSpec, device: Device) -> AttentionRunner:
        for library in self.libraries:
            if not library.reasons(spec, device):
                return library.open(spec, device)
        reasons = "; ".join(self.refusals(spec, device))
        raise BackendError(f"{self.name} attention cannot serve this: {reasons}; sdpa or torch would.")
