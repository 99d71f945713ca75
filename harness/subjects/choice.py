"""Which subject the options of a run ask for. Its module, and what that needs, is imported only then."""

from __future__ import annotations

from collections.abc import Callable

from backbench.harness.options import RunOptions
from backbench.harness.subjects.subject import Subject


def subject_class(options: RunOptions) -> Callable[[RunOptions], Subject]:
    """What makes the subject: a server's where there is an address, else the engine's."""
    if "url" in options.server:
        from backbench.harness.subjects.url.subject import UrlSubject

        return UrlSubject
    from backbench.harness.subjects.engine import EngineSubject

    return EngineSubject
