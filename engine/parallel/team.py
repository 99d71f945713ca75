"""Processes of one host that work as one, this one the first: started, watched, and never left behind.

A team's other members wait for a function to call, all at once and this process with them. What they need to
meet is a folder and an anonymous piece of memory, which they inherit: nothing of it has a name that could
outlive them. Each holds the end of a pipe whose other end only this process has, and ends when that closes,
however this process ended.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from shutil import rmtree
from typing import Any

import psutil

from backbench.backends.interface import Device, Peers
from backbench.engine.parallel.peers import join, leave
from backbench.errors import EngineError

LOOK_S = 0.05
"""How often it is looked whether all members live."""
STILL_S = 4.0
"""A wait in which nobody does anything for so long has no end."""
STIRRING_S = 0.03
"""CPU seconds of a process that are no work: gloo's threads wake a hundred times a second."""
LONG_S = 0.3
"""From when on a wait is looked into: steps are shorter."""
GOING_S = 3.0
"""What members have to end by themselves."""
STARTING_S = 120.0
"""What they have to start: importing torch takes seconds."""


@dataclass(frozen=True)
class Member:
    """What a function that a team calls is given."""

    peers: Peers
    memory: int
    """Descriptor of the memory that all members share; who needs it makes it as large as that."""
    connection: Connection | None
    """To the first member; None = this is the first."""


class Team:
    """`world` processes with a device each, from this one's device on. Close it; the garbage collector and
    the interpreter's end do so, too."""

    def __init__(self, world: int, device: Device) -> None:
        """Starts the others and meets them. Raises EngineError where they do not come."""
        self.world = world
        self.fault: str | None = None
        """Why the team is lost: a member died, failed or hangs."""
        self.when_lost: list[Callable[[], None]] = []
        """Called then, so that this process stops waiting as well."""
        self._folder = Path(tempfile.mkdtemp(prefix="backbench-"))
        self._memory = _anonymous_memory()
        self._reading = threading.Lock()
        self._words: dict[int, str] = {}
        """What members said last, by rank."""
        self._waiting: tuple[float, int] | None = None
        """Since when (s), and which thread."""
        self._seen = 0.0
        self._still_since = 0.0
        self._on_cpu = device.torch_device.type == "cpu"
        self._closing = threading.Event()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []
        reader, lifeline = os.pipe()
        self._end = weakref.finalize(
            self, _end, self._processes, self._connections, lifeline, self._memory, self._folder
        )
        try:
            for rank in range(1, world):
                self._start(rank, reader)
        finally:
            os.close(reader)
        threading.Thread(target=_watch, args=(weakref.ref(self), self._closing), daemon=True).start()
        try:
            self.results(STARTING_S)  # each says that it is there
            for rank, connection in enumerate(self._connections, start=1):
                connection.send((rank, world, device, self._folder))
            self.member = Member(join(0, world, device, self._folder), self._memory, None)
            self.results(STARTING_S)
        except BaseException:
            self.close()
            raise

    def _start(self, rank: int, lifeline: int) -> None:
        ours, theirs = socket.socketpair()
        importable = os.pathsep.join(filter(None, sys.path))
        environment = {"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONPATH": importable}
        with theirs:
            command = [sys.executable, "-P", "-m", "backbench.engine.parallel.worker"]
            self._processes.append(
                subprocess.Popen(
                    [*command, str(theirs.fileno()), str(lifeline), str(self._memory)],
                    pass_fds=(theirs.fileno(), lifeline, self._memory),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    env=environment,
                )
            )
        self._connections.append(Connection(ours.detach()))

    @property
    def pids(self) -> list[int]:
        """Of the other members, by rank from 1."""
        return [process.pid for process in self._processes]

    def call(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """function(member, *arguments) on every member at once; what each returned, by rank."""
        self.begin(function, *arguments)
        own = function(self.member, *arguments)
        return [own, *self.results()]

    def begin(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Have every other member call the function; `results` waits for what it returns."""
        for connection in self._connections:
            self._send(lambda to: to.send((function, arguments)), connection)

    def tell(self, message: bytes) -> None:
        """Bytes to every other member, which the function it is in receives."""
        for connection in self._connections:
            self._send(lambda to: to.send_bytes(message), connection)

    def results(self, most_s: float | None = None) -> list[Any]:
        """What every other member says next, by rank. Raises EngineError where one is lost, or is late."""
        return [
            self._result(rank, connection, most_s) for rank, connection in enumerate(self._connections, 1)
        ]

    def _result(self, rank: int, connection: Connection, most_s: float | None) -> Any:
        start = time.monotonic()
        while True:
            self.require()
            with self._reading:
                if connection.poll(0):
                    try:
                        found = connection.recv()
                    except (EOFError, OSError):
                        break
                    if isinstance(found, Failure):
                        self._words[rank] = found.text
                        break
                    return found
            connection.poll(LOOK_S)
            if most_s is not None and time.monotonic() - start > most_s:
                raise EngineError(f"Rank {rank} of {self.world} did not come within {most_s:.0f} s.")
        self.require_still()
        raise EngineError(f"Rank {rank} of {self.world} closed its connection.")

    def require(self) -> None:
        """Raises EngineError where the team is lost, and gives back what there is of it."""
        if self.fault is not None:
            self.close()
            raise EngineError(self.fault)

    def require_still(self) -> None:
        """As `require`, of an error that a member's end may have caused: it may be noticed a moment later."""
        deadline = time.monotonic() + 10 * LOOK_S
        while self.fault is None and time.monotonic() < deadline:
            time.sleep(LOOK_S)
        self.require()

    def waiting(self, on: bool) -> None:
        """This thread waits from now on, or no longer, for what every member takes part in."""
        self._waiting = (time.monotonic(), threading.get_ident()) if on else None

    def close(self) -> None:
        """End the others, give everything back and leave their group. Harmless when repeated."""
        self._closing.set()
        if self._end.alive:
            for connection in self._connections:
                connection.close()
            if self.fault is None or self._on_cpu:
                leave()  # as the others do now
            self._end()

    def _send(self, send: Callable[[Connection], None], connection: Connection) -> None:
        try:
            send(connection)
        except OSError:
            self.require_still()
            raise

    def look(self) -> None:
        """Note a fault, and end everyone where there is one, so that nobody waits for the lost."""
        if self.fault is None and not self._closing.is_set():
            self.fault = self._ended() or self._stuck()
            if self.fault is not None:
                for process in self._processes:
                    process.kill()
                for action in self.when_lost:
                    action()

    def _ended(self) -> str | None:
        codes = {rank: process.poll() for rank, process in enumerate(self._processes, start=1)}
        ended = {rank: code for rank, code in codes.items() if code is not None}
        if not ended:
            return None
        # Who was killed is the cause; others then fail because of that.
        rank = min(ended, key=lambda each: (ended[each] >= 0, each))
        code = ended[rank]
        why = f"it was ended by {signal.Signals(-code).name}" if code < 0 else self._last_words(rank)
        why = why or f"its exit code is {code}"
        return f"Rank {rank} of {self.world} (process {self.pids[rank - 1]}) is lost: {why}"[:280]

    def _last_words(self, rank: int) -> str | None:
        """Why the member says it failed."""
        with self._reading:
            try:
                while self._connections[rank - 1].poll(0):
                    found = self._connections[rank - 1].recv()
                    if isinstance(found, Failure):
                        self._words[rank] = found.text
            except (EOFError, OSError):
                pass  # all it said was read
        return self._words.get(rank)

    def _stuck(self) -> str | None:
        waiting, now = self._waiting, time.monotonic()
        if waiting is None:
            return None
        since, thread = waiting
        if now - since < LONG_S:
            return None
        spent = self._spent(thread)
        # A compiler that ends takes its seconds with it.
        if abs(sum(spent) - self._seen) > STIRRING_S * len(spent):
            self._seen, self._still_since = sum(spent), now
        if now - max(since, self._still_since) < STILL_S:
            return None
        pids = dict(enumerate(self.pids, start=1))
        stopped = {
            rank for rank, pid in pids.items() if psutil.Process(pid).status() == psutil.STATUS_STOPPED
        }
        names = ", ".join(f"{rank} (process {pids[rank]})" for rank in sorted(stopped or pids))
        return f"Of {self.world} ranks, no answer came within {STILL_S:.0f} s: rank {names}"[:280]

    def _spent(self, thread: int) -> tuple[float, ...]:
        """CPU seconds of the members; on a CPU of the waiting thread as well, on a GPU that spins."""
        members = [psutil.Process(pid) for pid in self.pids]
        compilers = [child for member in members for child in member.children(recursive=True)]
        times = [process.cpu_times() for process in (*members, *compilers)]
        own = (time.clock_gettime(time.pthread_getcpuclockid(thread)),) if self._on_cpu else ()
        return (*own, *(each.user + each.system for each in times))


@dataclass(frozen=True)
class Failure:
    """What a member says last where it failed."""

    text: str


def _watch(team: weakref.ref[Team], closing: threading.Event) -> None:
    while not closing.wait(LOOK_S):
        found = team()
        if found is None:
            return
        try:
            found.look()
        except psutil.NoSuchProcess:
            continue  # it has just ended, as the next look says
        del found


def _anonymous_memory() -> int:
    """A descriptor of memory without a name."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("backbench")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _end(
    processes: Sequence[subprocess.Popen[bytes]],
    connections: Sequence[Connection],
    lifeline: int,
    memory: int,
    folder: Path,
) -> None:
    """Members end when their connection closes; who does not is killed."""
    for connection in connections:
        connection.close()
    deadline = time.monotonic() + GOING_S
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    os.close(lifeline)
    os.close(memory)
    rmtree(folder, ignore_errors=True)
