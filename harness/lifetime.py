"""A process that does not outlive the one that started it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
"""prctl(2): the signal to get when the parent ends."""


def die_with(parent: int) -> None:
    """Be killed when the process `parent`, which started this one, ends; at once where it has.

    Linux kills it; elsewhere it goes on.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(f"The process {parent} that started this one has ended.")
