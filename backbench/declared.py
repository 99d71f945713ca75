"""What the modules of a folder declare, so that adding one is adding a file."""

from __future__ import annotations

import importlib
import pkgutil
from operator import attrgetter
from types import ModuleType
from typing import Any


def declared(package: ModuleType, name: str) -> tuple[Any, ...]:
    """What the package's modules hold as `name`, by its own `name`; those without one are helpers."""
    modules = [
        importlib.import_module(f"{package.__name__}.{found.name}")
        for found in pkgutil.iter_modules(package.__path__)
    ]
    return tuple(
        sorted((getattr(each, name) for each in modules if hasattr(each, name)), key=attrgetter("name"))
    )
