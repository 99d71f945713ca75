"""A server as a replay's target: client processes send the requests, and hand on what they stamped."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backbench.errors import HarnessError
from backbench.harness.subjects.target import TokenEvent
from backbench.harness.subjects.url.channel import ClientSettings, Seen, Unpacker, packed
from backbench.workloads.request import Request

if TYPE_CHECKING:
    from backbench.engine.request import StepStats

LONGEST_WAIT_S = 0.05
"""A poll returns at least this often, so that Ctrl-C is answered."""
START_S = 60.0
"""How long a process may take to import its libraries."""
REPORT_S = 10.0
MODULE = "backbench.harness.subjects.url.client"


class ClientProcess:
    """One client process, and the run's end of the socket pair to it."""

    def __init__(self, settings: ClientSettings) -> None:
        """Start it; raises HarnessError where it does not come up."""
        self.socket, other = socket.socketpair()
        self.in_flight: set[int] = set()
        self._unpack = Unpacker()
        with other:
            self.process = start_python(["-m", MODULE, str(other.fileno())], pass_fds=(other.fileno(),))
        self.socket.settimeout(START_S)
        try:
            self.socket.sendall(packed(settings))
            self.messages()
        except (OSError, HarnessError):
            self.close()
            raise HarnessError("A client process did not start; see what it wrote above.") from None
        self.socket.settimeout(None)

    def send(self, *message: Any) -> None:
        """Hand a message over; the process always reads, so this is short."""
        try:
            self.socket.sendall(packed(message))
        except OSError:
            raise self._gone() from None

    def messages(self) -> list[tuple[str, Any]]:
        """What it said; waits for the first bytes. HarnessError where it ended or has a defect."""
        found: list[tuple[str, Any]] = []
        while not found:
            received = self.socket.recv(2**20)
            if not received:
                raise self._gone()
            found = self._unpack.feed(received)
        for what, content in found:
            if what == "defect":
                raise HarnessError(f"A client process has a defect: {content[:200]}")
        return found

    def _gone(self) -> HarnessError:
        return HarnessError("A client process has ended, and its requests with it; run again.")

    def close(self) -> None:
        """End it; it needs nothing to be finished."""
        self.socket.close()
        self.process.terminate()
        self.process.wait()


def start_python(
    arguments: Sequence[str], pass_fds: Sequence[int] = (), stdout: int = subprocess.DEVNULL
) -> subprocess.Popen[str]:
    """This same Python with this same Backbench. Ctrl-C in a terminal does not reach it."""
    home = str(Path(__file__).parents[4])
    paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-P", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        pass_fds=tuple(pass_fds),
        process_group=0,
    )


class Clients:
    """Several client processes that share a run's requests."""

    def __init__(self, settings: ClientSettings, processes: int) -> None:
        self._all: list[ClientProcess] = []
        try:
            for _ in range(processes):
                self._all.append(ClientProcess(settings))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Clients:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def in_flight(self) -> int:
        return sum(len(each.in_flight) for each in self._all)

    def send(self, request_id: int, body: bytes) -> None:
        """Give a request to the process that has the fewest."""
        client = min(self._all, key=lambda each: len(each.in_flight))
        client.send("send", request_id, body)
        client.in_flight.add(request_id)

    def seen(self, wait_s: float) -> list[Seen]:
        """What the processes have seen; waits for something, but no longer than `wait_s`."""
        ready, _, _ = select.select([each.socket for each in self._all], (), (), wait_s)
        found = []
        for client in self._all:
            if client.socket in ready:
                for what, content in client.messages():
                    if what == "seen":
                        found += [Seen(*each) for each in content]
                client.in_flight.difference_update(each.request_id for each in found if each.finished)
        return found

    def abort(self) -> None:
        """Drop everything in flight, and what was not handed on of it."""
        with contextlib.suppress(HarnessError):  # a process that is gone has dropped it
            for client in self._all:
                client.in_flight.clear()
                client.send("abort")
            self.reports()  # whatever comes before the answer to this belongs to what was dropped

    def reports(self) -> list[dict[str, Any]]:
        """What each process counted since the last report; see `client.Client._report`."""
        found = []
        for client in self._all:
            client.send("report")
            client.socket.settimeout(REPORT_S)
            report = None
            try:
                while report is None:
                    report = next((each for what, each in client.messages() if what == "report"), None)
            except TimeoutError:
                raise HarnessError("A client process does not answer; run again.") from None
            finally:
                client.socket.settimeout(None)
            found.append(report)
        return found

    def close(self) -> None:
        """End the processes."""
        for client in self._all:
            client.close()


class UrlTarget:
    """`submit` hands a request to a client process; `poll` returns what the processes stamped."""

    def __init__(
        self,
        clients: Clients,
        encode: Callable[[Request], bytes],
        clock: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        self.steps: list[StepStats] = []
        """A server's steps are not known."""
        self.most_in_flight = 0
        self.chunks_by_second: Counter[int] = Counter()
        """Second of the clock -> chunks that came in it."""
        self.usage: Counter[str] = Counter()
        """The server's own counts, summed over the measured requests that it gave them for."""
        self.errors: Counter[str] = Counter()
        """What failed requests said."""
        self._clients = clients
        self._encode = encode
        self._clock = clock
        self._begun: set[int] = set()

    @property
    def running(self) -> int:
        """Requests that have shown a token."""
        return len(self._begun)

    @property
    def waiting(self) -> int:
        """Requests that have shown none yet."""
        return self._clients.in_flight - len(self._begun)

    def submit(self, request: Request) -> int:
        """Hand the request to a client process; the event of its first token says when it went out."""
        self._clients.send(request.id, self._encode(request))
        self.most_in_flight = max(self.most_in_flight, self._clients.in_flight)
        return self._clock()

    def poll(self, deadline_ns: int | None) -> list[TokenEvent]:
        """What was seen since; waits for something until the deadline, at most 50 ms."""
        wait_s = LONGEST_WAIT_S
        if deadline_ns is not None:
            wait_s = min(wait_s, max(0.0, (deadline_ns - self._clock()) / 1e9))
        return [self._event(each) for each in self._clients.seen(wait_s)]

    def abort(self) -> None:
        """Drop everything in flight."""
        self._clients.abort()
        self._begun.clear()

    def _event(self, seen: Seen) -> TokenEvent:
        usage_tokens = None
        if seen.finished:
            self._begun.discard(seen.request_id)
            usage_tokens = self._note_end(seen)
        else:
            self._begun.add(seen.request_id)
            self.chunks_by_second[seen.time_ns // 10**9] += 1
        return TokenEvent(
            seen.request_id,
            seen.time_ns,
            seen.tokens,
            seen.token_ids,
            seen.finished,
            seen.error,
            seen.sent_ns,
            seen.counts,
            usage_tokens,
        )

    def _note_end(self, seen: Seen) -> int | None:
        """Sum the server's counts; returns the output tokens of this request by them."""
        if seen.error is not None:
            self.errors[seen.error] += 1
        usage = seen.usage or {}
        if seen.request_id >= 0:
            details = usage.get("prompt_tokens_details")
            details = details if isinstance(details, dict) else {}
            self.usage["requests"] += 1
            self.usage["requests_with_usage"] += bool(usage)
            for name, value in (usage | details).items():
                if isinstance(value, int) and name in ("prompt_tokens", "completion_tokens", "cached_tokens"):
                    self.usage[name] += value
        return usage.get("completion_tokens")
