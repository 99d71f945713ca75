"""`bench` in a process that does not outlive the one that started it.

    python -m backbench.harness.sweep.child PARENT ARGUMENT...

A worker killed outright cannot end its run, and a run without a worker would measure beside the next one.
Linux ends it; elsewhere it goes on to its end, and nobody publishes what it writes.
"""

from __future__ import annotations

import sys

from backbench.harness.cli import main
from backbench.harness.lifetime import die_with

if __name__ == "__main__":
    die_with(int(sys.argv[1]))
    sys.argv = ["bench", *sys.argv[2:]]  # what a record keeps as its command
    main()
