"""A library as released: is it installed, and does it take our calls. It is imported when it is used."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from backbench.errors import BackendError


def installed_version(distribution: str) -> str | None:
    """The installed version of what PyPI calls `distribution`; None = not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Release:
    """One library, and the release whose signatures our calls are checked against."""

    distribution: str
    """Its name on PyPI."""
    checked_version: str

    def version(self) -> str | None:
        """The installed version; None = not installed."""
        return installed_version(self.distribution)

    def label(self) -> str:
        """Name and installed version, for the record."""
        return f"{self.distribution} {self.version()}"

    def absent(self) -> list[str]:
        """Why it cannot be imported; empty = it is installed."""
        if self.version() is not None:
            return []
        return [f"{self.distribution} is not installed (pip install {self.pin})"]

    @property
    def pin(self) -> str:
        """What pip installs to get the checked release."""
        return f"{self.distribution}=={self.checked_version}"

    def function(self, module: str, name: str, keywords: Sequence[str]) -> Callable[..., Any]:
        """`module.name`, after making sure that it takes every keyword we pass.

        Raises:
            BackendError: the import fails, or the installed version's signature is another.
        """
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise BackendError(f"{self.label()} cannot be used: {error}; reinstall it.") from error
        missing = sorted(set(keywords) - set(inspect.signature(found).parameters))
        if missing:
            raise BackendError(f"{self.label()}: {name} takes no {', '.join(missing)}; install {self.pin}.")
        checked: Callable[..., Any] = found
        return checked
