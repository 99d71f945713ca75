"""A member of a team, in a process of its own: calls what it is told to, until its team is gone.

python -m backbench.engine.parallel.worker CONNECTION LIFELINE MEMORY      (inherited descriptors)
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from shutil import rmtree

from backbench.engine.parallel.part import device_of
from backbench.engine.parallel.peers import join, leave
from backbench.engine.parallel.team import Failure, Member

PR_SET_PDEATHSIG = 1
"""prctl(2): the signal to get when the parent ends."""


def main() -> None:
    """Serve the connection until it closes; exit code 1 where a call failed, after saying why."""
    for ignored in (signal.SIGINT, signal.SIGTERM):  # the first member decides, and its end is noticed
        signal.signal(ignored, signal.SIG_IGN)
    connection, lifeline, memory = Connection(int(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
    folder: list[Path] = []
    if sys.platform == "linux":
        # Also a stopped process shall see that the first one has ended.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGCONT)
    threading.Thread(target=_end_with_the_first, args=(lifeline, folder), daemon=True).start()
    try:
        connection.send("started")
        rank, world, device, where = connection.recv()
        folder.append(where)
        member = Member(join(rank, world, device_of(device, rank), where), memory, connection)
        connection.send("joined")
        while True:
            function, arguments = connection.recv()
            connection.send(function(member, *arguments))
    except (EOFError, ConnectionError):
        leave()  # the team has closed
    except Exception as error:
        said = " ".join(f"{error}".split()) or type(error).__name__
        connection.send(Failure(said))
        os._exit(1)


def _end_with_the_first(lifeline: int, folder: list[Path]) -> None:
    """However the first member ends, its end of the pipe closes; nothing of the team may outlive it."""
    os.read(lifeline, 1)
    for each in folder:
        rmtree(each, ignore_errors=True)
    os._exit(0)


if __name__ == "__main__":
    main()
