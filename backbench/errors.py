"""Every error a user can cause, in one tree. Each message is one line: what is wrong and what to do.

`exit_code` is what the command line ends with: 2 usage or a fault, 4 invalid or incomparable, 5 wrong.
"""

from __future__ import annotations

REGRESSED, USAGE, INCONCLUSIVE, INVALID, WRONG, INTERRUPTED = 1, 2, 3, 4, 5, 130
"""Exit codes besides 0."""


class BackbenchError(Exception):
    """Something a user can mend; the command line prints its message and no stack trace."""

    def __init__(self, message: str, exit_code: int = USAGE) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class WorkloadError(BackbenchError):
    """A workload cannot be made."""


class BackendError(BackbenchError):
    """A backend cannot do what was asked."""


class EngineError(BackbenchError):
    """The engine cannot do what was asked."""


class ReportError(BackbenchError):
    """A record or report cannot be read or written."""


class HarnessError(BackbenchError):
    """An experiment cannot be run."""
