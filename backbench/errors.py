"""Every error a user can cause, in one tree. Each message is one line: what is wrong and what to do.

`exit_code` is what the command line ends with: 2 usage or a fault, 4 invalid or incomparable, 5 wrong.
"""

from __future__ import annotations

import re

REGRESSED, USAGE, INCONCLUSIVE, INVALID, WRONG, INTERRUPTED = 1, 2, 3, 4, 5, 130
"""Exit codes besides 0."""


def shown(value: object, limit: int = 40) -> str:
    """A value for an error line, as Python would write it: printable, on one line, at most `limit` long."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def printable(text: str) -> str:
    """`text` with what would steer a terminal or is no text (control characters but tab and line feed,
    lone surrogates) written out, like \\x1b."""
    return text if text.isprintable() else _UNPRINTABLE.sub(lambda found: ascii(found.group())[1:-1], text)


_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class BackbenchError(Exception):
    """Something a user can mend; the command line prints its message and no stack trace."""

    def __init__(self, message: str, exit_code: int = USAGE) -> None:
        super().__init__(printable(message))
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
