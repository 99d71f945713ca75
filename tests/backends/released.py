"""Stand-ins for functions of libraries that are not installed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any


def with_signature(names: Sequence[str], body: Callable[..., Any]) -> Callable[..., Any]:
    """`body` behind the released parameter list: anything else raises TypeError."""
    parameters = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None) for name in names
    ]
    signature = inspect.Signature(parameters)

    def call(*args: Any, **kwargs: Any) -> Any:
        return body(**signature.bind(*args, **kwargs).arguments)

    call.__signature__ = signature  # type: ignore[attr-defined]
    return call
