"""The harness's error class."""

from __future__ import annotations


class HarnessError(Exception):
    """An experiment cannot be run or read. The message is one line: what is wrong and what to do.

    `exit_code` is what the command line ends with: 2 usage, 4 invalid or incomparable.
    """

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code
