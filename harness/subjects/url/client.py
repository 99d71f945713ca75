"""A client process: it sends requests to the server and stamps the answers as their bytes arrive.

    python -m backbench.harness.subjects.url.client SOCKET    # the descriptor of its end of a socket pair

It does nothing else, so that neither the replay nor the telemetry delays a stamp. It ends when the other
end of the pair does.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any

import aiohttp

from backbench.harness.subjects.url.channel import ClientSettings, Seen, Unpacker, packed
from backbench.harness.subjects.url.files import allow_many_files
from backbench.harness.subjects.url.stream import Answer, EventStream, StreamError, message_of

FLUSH_S = 0.02
"""Tokens are handed on so late at most; the end of a request at once."""
BEAT_S = 0.02
"""How often the loop's lateness is measured."""
DRAIN_S = 1.0
"""How long the end of a response is waited for, so that its connection can be used again."""
KEEP_ALIVE_S = 3.0
"""Idle connections are closed before a server does it: uvicorn's default is 5 s, and a request that meets the
closing would fail."""
MOST_SAMPLES = 2_000_000
"""Delays and beats that are kept."""
LONGEST_ERROR_BYTES = 4096
MOST_UNCOLLECTED = 20_000
"""Requests that may end before garbage is collected in the middle of others: with 2,000 streams that holds up
every stamp for a tenth of a second."""


class Arrival(asyncio.Protocol):
    """Stands before a connection's own protocol and notes when bytes came.

    The task that reads them runs only after whatever else came in the same turn of the loop. It also ends a
    response whose connection is gone: after a chunk without a length aiohttp closes it and tells no reader.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._last_ns = 0
        self._content: aiohttp.StreamReader | None = None

    @classmethod
    def of(cls, response: aiohttp.ClientResponse) -> Arrival | None:
        """That of a response's connection; None where all of the response is here already."""
        connection = response.connection
        if connection is None:
            return None
        if (transport := connection.transport) is None:
            _end_reading(response.content)
            return None
        protocol = transport.get_protocol()
        if not isinstance(protocol, cls):
            protocol = cls(protocol)
            transport.set_protocol(protocol)
        protocol._content = response.content
        return protocol

    def take_ns(self) -> int:
        """When the last bytes came; now, where none came since this was asked."""
        found, self._last_ns = self._last_ns, 0
        return found or time.perf_counter_ns()

    def data_received(self, data: bytes) -> None:
        self._last_ns = time.perf_counter_ns()
        self._inner.data_received(data)

    def eof_received(self) -> Any:
        return self._inner.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._inner.connection_lost(exc)
        if self._content is not None:
            _end_reading(self._content)

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()


def _end_reading(content: aiohttp.StreamReader) -> None:
    """Nothing more will come: fail whoever waits for it."""
    if not content.is_eof() and content.exception() is None:
        content.set_exception(StreamError("malformed HTTP"))


class Flight:
    """One request under way."""

    def __init__(self, request_id: int, now_ns: int) -> None:
        self.request_id = request_id
        self.task: asyncio.Task[None] | None = None
        self.answer = Answer()
        self.begun_ns = now_ns
        self.sent_ns: int | None = None
        self.last_ns: int | None = None
        """When its last token was seen."""
        self.chunks: list[int] = []
        """Events of each chunk that showed tokens; counted ones by their tokens."""
        self.delay_ns: int | None = None
        """From the null server's writing its last token to the stamp here."""
        self.timed_out: str | None = None
        self.ended = False

    def overdue(self, now_ns: int, limits: ClientSettings) -> str | None:
        """Which limit it has passed."""
        first_s, stall_s, whole_s = (
            limits.first_token_timeout_s,
            limits.token_timeout_s,
            limits.request_timeout_s,
        )
        if now_ns - self.begun_ns > whole_s * 1e9:
            return f"not finished within {whole_s:g} s (--request-timeout)"
        if self.last_ns is None:
            if now_ns - self.begun_ns > first_s * 1e9:
                return f"no token within {first_s:g} s (--first-token-timeout)"
        elif now_ns - self.last_ns > stall_s * 1e9:
            return f"no further token within {stall_s:g} s (--token-timeout)"
        return None


class Client(asyncio.Protocol):
    """The process's end of the socket pair, and every request it has under way."""

    def __init__(self, settings: ClientSettings) -> None:
        self.settings = settings
        self.closed = asyncio.Event()
        self.connections = 0
        """Opened so far."""
        self._flights: dict[int, Flight] = {}
        self._unpack = Unpacker()
        self._pending: list[Seen] = []
        self._flushing = False
        self._first_delays_ns: list[int] = []
        self._delays_ns: list[int] = []
        self._gap_errors_ns: list[int] = []
        self._beats_ns: list[tuple[int, int]] = []
        """When, and how late the loop was."""
        self._uncollected = 0
        self._chunks = 0
        self._begun = (time.perf_counter_ns(), time.process_time_ns())
        self._session: aiohttp.ClientSession | None = None
        self._transport: asyncio.Transport | None = None

    async def run(self, end: socket.socket) -> None:
        """Serve the other end of the pair until it is closed."""
        loop = asyncio.get_running_loop()
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self.settings.connect_timeout_s)
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S, ttl_dns_cache=None)
        async with aiohttp.ClientSession(
            connector=connector,
            timeout=timeout,
            headers={"Content-Type": "application/json", "Accept-Encoding": "identity"}
            | self.settings.headers,
            cookie_jar=aiohttp.DummyCookieJar(),
            trace_configs=[self._tracing()],
            auto_decompress=False,
        ) as self._session:
            await loop.create_connection(lambda: self, sock=end)
            periodic = [
                asyncio.create_task(each) for each in (self._flush_often(), self._watch(), self._beat())
            ]
            await self.closed.wait()
            for task in (*periodic, *(flight.task for flight in self._flights.values())):
                if task is not None:
                    task.cancel()

    def _tracing(self) -> aiohttp.TraceConfig:
        tracing = aiohttp.TraceConfig()

        async def sent(session: Any, context: Any, _: Any) -> None:
            context.trace_request_ctx.sent_ns = time.perf_counter_ns()

        async def opened(session: Any, context: Any, _: Any) -> None:
            self.connections += 1

        tracing.on_request_headers_sent.append(sent)
        tracing.on_connection_create_end.append(opened)
        return tracing

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._tell("ready", os.getpid())

    def data_received(self, data: bytes) -> None:
        for what, *rest in self._unpack.feed(data):
            if what == "send":
                self._start(*rest)
            elif what == "abort":
                self._abort()
            else:
                self._report()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set()

    def _tell(self, what: str, content: Any) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(packed((what, content)))

    def _start(self, request_id: int, body: bytes) -> None:
        flight = Flight(request_id, time.perf_counter_ns())
        self._flights[request_id] = flight
        flight.task = asyncio.create_task(self._serve(flight, body))
        flight.task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            lines = traceback.format_exception_only(error)
            self._tell("defect", " ".join(" ".join(lines).split()))

    def _abort(self) -> None:
        for flight in self._flights.values():
            if flight.task is not None:
                flight.task.cancel()
        self._flights.clear()
        self._pending.clear()

    async def _serve(self, flight: Flight, body: bytes) -> None:
        error = None
        try:
            await self._exchange(flight, body)
        except asyncio.CancelledError:
            if flight.timed_out is None:
                raise  # the run was aborted
            error = flight.timed_out
        except StreamError as problem:
            error = str(problem)
        except (aiohttp.ClientError, OSError, TimeoutError) as problem:
            error = explained(problem, self.settings)
        self._end(flight, time.perf_counter_ns(), error)

    async def _exchange(self, flight: Flight, body: bytes) -> None:
        assert self._session is not None
        answer, stream = flight.answer, EventStream()
        async with self._session.post(
            self.settings.url, data=body, trace_request_ctx=flight, allow_redirects=False
        ) as response:
            if response.status != 200:
                raise StreamError(await _refusal(response))
            if response.content_type != "text/event-stream":
                raise StreamError(f"the answer is no stream of events but {response.content_type[:40]}")
            content, arrival = response.content, Arrival.of(response)
            while not answer.done:
                received = await content.readany()
                now_ns = time.perf_counter_ns() if arrival is None else arrival.take_ns()
                if not received:
                    break
                self._take(flight, stream.feed(received), now_ns)
            if not answer.done and answer.finish_reason is None:
                raise StreamError("the stream ended before the answer did")
            self._end(flight, now_ns, None)
            if not content.at_eof():
                async with asyncio.timeout(DRAIN_S):
                    await content.readany()

    def _take(self, flight: Flight, events: Sequence[bytes], now_ns: int) -> None:
        """What one read brought is one chunk: its tokens became visible together."""
        answer, total, shown, known = flight.answer, 0, 0, True
        ids: list[int] = []
        for event in events:
            count = answer.take(event)
            if count is None:
                known, shown = False, shown + 1
            elif count:
                total, shown = total + count, shown + count
                ids += answer.token_ids
            if answer.written_ns is not None and count != 0:
                self._note_delay(flight, now_ns)
        if shown:
            self._chunks += 1
            flight.last_ns = now_ns
            flight.chunks.append(shown)
            sent_ns = flight.sent_ns if len(flight.chunks) == 1 else None
            self._pending.append(
                Seen(flight.request_id, now_ns, total if known else None, tuple(ids), sent_ns=sent_ns)
            )

    def _note_delay(self, flight: Flight, now_ns: int) -> None:
        """What the way from the null server to this stamp took; see `null_server`."""
        answer = flight.answer
        assert answer.written_ns is not None
        if len(self._delays_ns) >= MOST_SAMPLES:
            return
        if flight.last_ns is None and answer.received_ns is not None and flight.sent_ns is not None:
            in_server = answer.written_ns - answer.received_ns
            self._first_delays_ns.append(now_ns - flight.sent_ns - in_server)
        delay_ns = now_ns - answer.written_ns
        self._delays_ns.append(delay_ns)
        if flight.delay_ns is not None:
            self._gap_errors_ns.append(abs(delay_ns - flight.delay_ns))
        flight.delay_ns = delay_ns

    def _end(self, flight: Flight, now_ns: int, error: str | None) -> None:
        if flight.ended:
            return  # what fails after the answer's end is no failure of the request
        flight.ended = True
        self._flights.pop(flight.request_id, None)
        self._uncollected += 1
        answer = flight.answer
        counts = tuple(flight.chunks) if answer.one_each and error is None else None
        usage = None
        if answer.usage is not None:
            usage = {name: each for name, each in answer.usage.items() if isinstance(each, int | dict)}
        count = 0
        self._pending.append(
            Seen(flight.request_id, now_ns, count, (), True, error, flight.sent_ns, counts, usage)
        )
        if not self._flushing:
            self._flushing = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        if self._pending:
            pending, self._pending = self._pending, []
            self._tell("seen", [tuple(each) for each in pending])

    async def _flush_often(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_S)
            self._flush()

    async def _watch(self) -> None:
        """End what has passed a limit: one walk over all is cheaper than a timer a chunk. And tidy up."""
        limits = self.settings
        shortest_s = min(limits.first_token_timeout_s, limits.token_timeout_s, limits.request_timeout_s)
        while True:
            await asyncio.sleep(min(0.25, shortest_s / 4))
            now_ns = time.perf_counter_ns()
            for flight in list(self._flights.values()):
                flight.timed_out = flight.timed_out or flight.overdue(now_ns, limits)
                if flight.timed_out is not None and flight.task is not None:
                    flight.task.cancel()
            if self._uncollected > (0 if not self._flights else MOST_UNCOLLECTED):
                gc.collect()
                self._uncollected = 0

    async def _beat(self) -> None:
        """How late the loop comes to what is due."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + BEAT_S
            await asyncio.sleep(BEAT_S)
            if len(self._beats_ns) < MOST_SAMPLES:
                late_ns = max(0, round((loop.time() - due) * 1e9))
                self._beats_ns.append((time.perf_counter_ns(), late_ns))

    def _report(self) -> None:
        """What was counted since the last report."""
        now = (time.perf_counter_ns(), time.process_time_ns())
        self._tell(
            "report",
            {
                "wall_s": (now[0] - self._begun[0]) / 1e9,
                "cpu_s": (now[1] - self._begun[1]) / 1e9,
                "chunks": self._chunks,
                "connections": self.connections,
                "beats_ns": self._beats_ns,
                "first_delays_ns": self._first_delays_ns,
                "delays_ns": self._delays_ns,
                "gap_errors_ns": self._gap_errors_ns,
            },
        )
        self._begun, self._chunks = now, 0
        self._beats_ns, self._first_delays_ns = [], []
        self._delays_ns, self._gap_errors_ns = [], []


async def _refusal(response: aiohttp.ClientResponse) -> str:
    """Why the server did not serve it: the status, and its own words in short."""
    text = (await response.content.read(LONGEST_ERROR_BYTES)).decode("utf-8", "replace")
    try:
        said = message_of(json.loads(text))
    except (ValueError, RecursionError):
        said = message_of(text)
    return f"HTTP {response.status}" + (f": {said}" if said else "")


def explained(error: Exception, settings: ClientSettings) -> str:
    """A failed exchange in a few words that are the same for the same cause."""
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"no connection: {os.strerror(error.errno) if error.errno else 'the name is unknown'}"
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return f"no connection within {settings.connect_timeout_s:g} s (--connect-timeout)"
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return "the server closed the connection before it answered"
    if isinstance(error, aiohttp.ClientPayloadError):
        return "the connection ended in the middle of the answer"
    if isinstance(error, aiohttp.ClientResponseError):
        return "malformed HTTP"
    if isinstance(error, OSError | aiohttp.ClientConnectionError):
        number = getattr(error, "errno", None)
        return f"connection lost: {os.strerror(number)}" if number else "connection lost"
    return type(error).__name__


async def main(descriptor: int) -> None:
    """Read the settings, then serve."""
    end = socket.socket(fileno=descriptor)
    unpack = Unpacker()
    messages: list[Any] = []
    while not messages:
        received = end.recv(2**16)
        if not received:
            return
        messages = unpack.feed(received)
    end.setblocking(False)
    gc.collect()
    gc.freeze()
    gc.disable()  # `Client._watch` collects
    await Client(messages[0]).run(end)


if __name__ == "__main__":
    allow_many_files()
    asyncio.run(main(int(sys.argv[1])))
