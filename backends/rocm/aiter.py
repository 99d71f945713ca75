"""Is AITER here, and does it take our calls. Its functions are imported only when a runner opens."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from backends.interface import BackendError, Device

DISTRIBUTION = "amd-aiter"
CHECKED_VERSION = "0.1.7.post2.dev18"
"""The release whose signatures our calls are checked against."""
ARCHES = ("gfx942", "gfx950")
"""CDNA 3 and 4: what the assembly kernels are built for."""


def installed_version() -> str | None:
    """The installed version; None = not installed. Nothing is imported."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return None


def absent(device: Device) -> list[str]:
    """Reasons AITER cannot be used on `device`; empty = it can."""
    reasons = []
    if device.vendor != "amd" or device.arch not in ARCHES:
        reasons.append(f"needs {' or '.join(ARCHES)}, this is {device.arch}")
    if installed_version() is None:
        reasons.append(f"{DISTRIBUTION} is not installed (pip install {DISTRIBUTION}=={CHECKED_VERSION})")
    return reasons


def function(module: str, name: str, keywords: Sequence[str]) -> Callable[..., Any]:
    """`module.name`, after making sure that it takes every keyword we pass.

    Raises:
        BackendError: the import fails, or the installed version's signature is another.
    """
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise BackendError(f"{DISTRIBUTION} {installed_version()} cannot be used: {error}.") from error
    missing = sorted(set(keywords) - set(inspect.signature(found).parameters))
    if missing:
        raise BackendError(
            f"{DISTRIBUTION} {installed_version()}: {name} takes no {', '.join(missing)}; "
            f"install {DISTRIBUTION}=={CHECKED_VERSION}."
        )
    checked: Callable[..., Any] = found
    return checked
