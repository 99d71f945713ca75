"""A server that answers as a script says, fault or not, byte by byte, on a thread of its own."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
from collections.abc import Awaitable, Callable
from typing import Any

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"

Handler = Callable[["Exchange"], Awaitable[None]]


def event(text: str | None = " a", **more: Any) -> bytes:
    """One event of a completion; None = without a choice."""
    choices = [] if text is None else [{"index": 0, "text": text, "finish_reason": None}]
    return b"data: " + json.dumps({"choices": choices} | more).encode() + b"\n\n"


def usage(completion: int, prompt: int = 4) -> dict[str, Any]:
    return {"usage": {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": 0}}


DONE = b"data: [DONE]\n\n"


class Exchange:
    """One request, and the way back."""

    def __init__(
        self, server: FaultyServer, head: str, body: dict[str, Any], writer: asyncio.StreamWriter
    ) -> None:
        self.server, self.head, self.body, self._writer = server, head, body, writer

    async def raw(self, data: bytes) -> None:
        """Bytes as they are."""
        self._writer.write(data)
        await self._writer.drain()

    async def begin(self) -> None:
        await self.raw(HEAD)

    async def send(self, data: bytes) -> None:
        """One HTTP chunk."""
        await self.raw(b"%x\r\n%b\r\n" % (len(data), data))

    async def end(self) -> None:
        await self.raw(END)

    async def whole(self, tokens: int | None = None, counted: bool = True) -> None:
        """A right answer."""
        total = self.body["max_tokens"] if tokens is None else tokens
        await self.begin()
        for number in range(total):
            await self.send(event(" a", **(usage(number + 1) if counted else {})))
        await self.send(event(None, **usage(total)) + DONE)
        await self.end()

    async def status(self, line: str, content: bytes, headers: str = "") -> None:
        """A whole answer that is no stream."""
        head = f"HTTP/1.1 {line}\r\nContent-Type: application/json\r\n{headers}"
        head += f"Content-Length: {len(content)}\r\n\r\n"
        await self.raw(head.encode() + content)

    def reset(self) -> None:
        """End the connection with RST, as a killed process or a firewall does."""
        sock: socket.socket = self._writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()

    def close(self) -> None:
        """End the connection with FIN."""
        self._writer.close()


class FaultyServer:
    """Answers /v1/models, and each completion by `handler`; `kill` ends it and every connection at once."""

    def __init__(self, handler: Handler, owned_by: str = "vllm", card: dict[str, Any] | None = None) -> None:
        self.handler = handler
        self.card = {"id": "small", "owned_by": owned_by, "max_model_len": 4096} | (card or {})
        self.bodies: list[dict[str, Any]] = []
        self.heads: list[str] = []
        self.metrics = ""
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> FaultyServer:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        assert not self._thread.is_alive()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def kill(self) -> None:
        """As SIGKILL: no goodbye on any connection, and nobody listens any more."""
        self._loop.call_soon_threadsafe(self.kill_now)

    def kill_now(self) -> None:
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        for task in self._tasks:
            task.cancel()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._server = self._loop.run_until_complete(asyncio.start_server(self._accept, "127.0.0.1", 0))
        self.port = self._server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        pending = asyncio.all_tasks(self._loop)
        for task in pending:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
        self._loop.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        try:
            while True:
                await self._one(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            writer.transport.abort()
        finally:
            self._writers.discard(writer)
            self._tasks.discard(task)

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        lengths = [
            line.split(":")[1] for line in head.splitlines() if line.lower().startswith("content-length")
        ]
        body = json.loads(await reader.readexactly(int(lengths[0]))) if lengths else {}
        exchange = Exchange(self, head, body, writer)
        path = head.split(" ")[1]
        if path == "/v1/models":
            await exchange.status("200 OK", json.dumps({"data": [self.card]}).encode())
        elif path == "/metrics" and self.metrics:
            await exchange.status("200 OK", self.metrics.encode())
        elif head.startswith("POST"):
            self.heads.append(head)
            self.bodies.append(body)
            await self.handler(exchange)
        else:
            await exchange.status("404 Not Found", b"{}")
