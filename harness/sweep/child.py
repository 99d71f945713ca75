"""`bench` in a process that does not outlive the one that started it.

    python -m backbench.harness.sweep.child PARENT ARGUMENT...

A worker killed outright cannot end its run, and a run without a worker would measure beside the next one.
Linux ends it; elsewhere it goes on to its end, and nobody publishes what it writes.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from backbench.harness.cli import main

PR_SET_PDEATHSIG = 1
"""prctl(2): the signal to get when the parent ends."""


def die_with(parent: int) -> None:
    """Be killed when the process `parent`, which started this one, ends; at once where it has."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(f"The process {parent} that started this one has ended.")


if __name__ == "__main__":
    die_with(int(sys.argv[1]))
    sys.argv = ["bench", *sys.argv[2:]]  # what a record keeps as its command
    main()
