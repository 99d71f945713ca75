"""How many files a process may have open: each stream is one."""

from __future__ import annotations

import resource


def allow_many_files() -> None:
    """As many as this account may have at most."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
