"""Is AITER here. Its functions are imported only when a runner opens."""

from __future__ import annotations

from backbench.backends.dependency import Release
from backbench.backends.interface import Device

AITER = Release("amd-aiter", "0.1.7.post2.dev18")
ARCHES = ("gfx942", "gfx950")
"""CDNA 3 and 4: what the assembly kernels are built for."""


def absent(device: Device) -> list[str]:
    """Reasons AITER cannot be used on `device`; empty = it can."""
    fits = device.vendor == "amd" and device.arch in ARCHES
    reasons = [] if fits else [f"needs {' or '.join(ARCHES)}, this is {device.arch}"]
    return reasons + AITER.absent()
