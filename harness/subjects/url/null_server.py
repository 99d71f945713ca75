"""An OpenAI-compatible server that computes nothing: every token comes at its scripted time.

    bench null-server --port 8000 --ttft 0.05 --itl 0.01

A client is calibrated against it: whatever it measures beyond the script is its own cost. A token is one
segment (TCP_NODELAY) and says when it was written, by the clock that a client on this machine has, too; so
the server's own lateness is told apart from the client's.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import json
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np

from backbench.harness.subjects.url.files import allow_many_files

MODEL = "null"
VOCAB_SIZE, MAX_LEN = 1000, 2**20
MOST_TOKENS = 2**20
LONGEST_BODY = 64 * 2**20
DEFAULT_TOKENS = 16
"""Where a request names no number, as OpenAI's completions have it."""
MOST_SAMPLES = 2_000_000


@dataclass(frozen=True)
class Script:
    """When tokens come."""

    ttft_s: float = 0.05
    """From reading a request to its first token."""
    itl_s: float = 0.01
    """From each token to the next."""
    tokens: int | None = None
    """Of every answer; None = as many as asked for."""


class Stream:
    """One answer under way: what is due next, and how it is written."""

    def __init__(self, connection: Connection, asked: dict[str, Any], chat: bool, number: int) -> None:
        self.connection = connection
        self.received_ns = time.perf_counter_ns()
        script = connection.server.script
        limit = asked.get("max_completion_tokens") or asked.get("max_tokens") or DEFAULT_TOKENS
        self.total = script.tokens or min(int(limit), MOST_TOKENS)
        self.prompt_tokens = _prompt_tokens(asked)
        self.sent = 0
        self.due_ns = self.received_ns + round(script.ttft_s * 1e9)
        self.gap_ns = round(script.itl_s * 1e9)
        options = asked.get("stream_options") or {}
        self.streamed = bool(asked.get("stream"))
        self.with_usage = bool(options.get("include_usage"))
        self.continuous = bool(options.get("continuous_usage_stats"))
        self.chat = chat
        kind = "chat.completion" if chat else "text_completion"
        kind += ".chunk" if chat and self.streamed else ""
        model = json.dumps(asked.get("model") or MODEL)
        self.head = f'{{"id":"null-{number}","object":"{kind}","created":0,"model":{model},'
        shown = '"delta":{"content":" a"}' if chat else '"text":" a"'
        self.token = f'data: {self.head}"choices":[{{"index":0,{shown},"logprobs":null,"finish_reason":'

    def usage(self) -> str:
        """Counts so far, as JSON."""
        return (
            f'{{"prompt_tokens":{self.prompt_tokens},"completion_tokens":{self.sent},'
            f'"total_tokens":{self.prompt_tokens + self.sent}}}'
        )

    @property
    def at_last(self) -> bool:
        """The token that is due is the last one."""
        return self.sent + 1 >= self.total

    def write(self) -> None:
        """Write the token that is due."""
        last = self.at_last
        self.sent += 1
        self.due_ns += self.gap_ns
        if self.streamed:
            text = self.token + ('"length"}]' if last else "null}]")
            if self.continuous:
                text += f',"usage":{self.usage()}'
            if self.sent == 1:
                text += f',"received_ns":{self.received_ns}'
            written_ns = time.perf_counter_ns()
            chunk = f'{text},"written_ns":{written_ns}}}\n\n'
            self.connection.write_chunk(chunk + (self._tail() if last else ""), last)
        elif last:
            self.connection.write_json(self._whole())
        if last:
            self.connection.free()

    def _tail(self) -> str:
        usage = f'data: {self.head}"choices":[],"usage":{self.usage()}}}\n\n' if self.with_usage else ""
        return usage + "data: [DONE]\n\n"

    def _whole(self) -> str:
        text = json.dumps(" a" * self.total)
        shown = f'"message":{{"role":"assistant","content":{text}}}' if self.chat else f'"text":{text}'
        choice = f'{{"index":0,{shown},"logprobs":null,"finish_reason":"length"}}'
        return f'{self.head}"choices":[{choice}],"usage":{self.usage()}}}'


def _prompt_tokens(asked: dict[str, Any]) -> int:
    """Ids that were sent; of a text its words, for want of a tokenizer."""
    prompt = asked.get("prompt")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
        return len(prompt)
    if prompt is None:
        messages = asked.get("messages") or ()
        prompt = " ".join(str(each.get("content")) for each in messages if isinstance(each, dict))
    return len(str(prompt).split())


class Connection(asyncio.Protocol):
    """One client connection: requests after each other, each answered before the next is read."""

    def __init__(self, server: NullServer) -> None:
        self.server = server
        self.open = False
        self._buffer = bytearray()
        self._busy = False
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.open = True
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._read()

    def free(self) -> None:
        """An answer has ended: the next request may be read."""
        self._busy = False
        if self._buffer:
            self._read()

    def _read(self) -> None:
        while not self._busy and (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = bytes(self._buffer[:end]).decode("latin-1").split("\r\n")
            fields = dict(line.lower().split(": ", 1) for line in head[1:] if ": " in line)
            length = int(fields.get("content-length") or 0)
            if length > LONGEST_BODY:
                return self._refuse("413 Content Too Large", "the body is too long")
            if "expect" in fields and len(self._buffer) == end + 4 and length:
                self._write(b"HTTP/1.1 100 Continue\r\n\r\n")
            if len(self._buffer) < end + 4 + length:
                return None
            body = bytes(self._buffer[end + 4 : end + 4 + length])
            del self._buffer[: end + 4 + length]
            method, path, *_ = [*head[0].split(" "), "", ""]
            self._serve(method, path.split("?")[0].rstrip("/"), body)
        return None

    def _serve(self, method: str, path: str, body: bytes) -> None:
        if method == "POST" and path.endswith(("/completions", "/chat/completions")):
            try:
                asked = json.loads(body)
                stream = self.server.stream(self, asked, path.endswith("/chat/completions"))
            except (ValueError, TypeError, AttributeError, RecursionError):
                return self._refuse("400 Bad Request", "the body is no request")
            self._busy = True
            if stream.streamed:
                self._write(
                    b"HTTP/1.1 200 OK\r\nServer: backbench-null\r\nContent-Type: text/event-stream\r\n"
                    b"Cache-Control: no-cache\r\nTransfer-Encoding: chunked\r\n\r\n"
                )
            return self.server.schedule(stream)
        pages: dict[str, Callable[[], dict[str, Any]]] = {
            "/v1/models": self.server.models,
            "/stats": self.server.stats,
            "/health": dict,
        }
        if method == "GET" and path in pages:
            return self.write_json(json.dumps(pages[path]()))
        if method == "GET" and path == "/metrics":
            return self._write_whole("200 OK", "text/plain", self.server.metrics())
        return self._refuse("404 Not Found", "no such page")

    def _refuse(self, status: str, message: str) -> None:
        self._write_whole(status, "application/json", json.dumps({"error": {"message": message}}))

    def write_json(self, text: str) -> None:
        """A whole answer."""
        self._write_whole("200 OK", "application/json", text)

    def _write_whole(self, status: str, kind: str, text: str) -> None:
        content = text.encode()
        head = f"HTTP/1.1 {status}\r\nServer: backbench-null\r\nContent-Type: {kind}\r\n"
        self._write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)

    def write_chunk(self, text: str, last: bool) -> None:
        """A part of a streamed answer, in a segment of its own."""
        content = text.encode()
        self._write(b"%x\r\n%b\r\n%b" % (len(content), content, b"0\r\n\r\n" if last else b""))

    def _write(self, data: bytes) -> None:
        if self._transport is not None and self.open:
            self._transport.write(data)


class NullServer:
    """All connections, and one timer for the tokens of all streams."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self._numbers = count()
        self._due: list[tuple[int, int, Stream]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._armed_ns = 0
        self._late_ns: list[int] = []
        self._written = 0
        self._finished = 0

    def stream(self, connection: Connection, asked: dict[str, Any], chat: bool) -> Stream:
        """The answer to a request; raises ValueError, TypeError or AttributeError where it is none."""
        return Stream(connection, asked, chat, next(self._numbers))

    def schedule(self, stream: Stream) -> None:
        """Answer from now on."""
        heapq.heappush(self._due, (stream.due_ns, next(self._numbers), stream))
        self._arm()

    def _arm(self) -> None:
        if not self._due:
            return
        due_ns = self._due[0][0]
        if self._timer is not None:
            if self._armed_ns <= due_ns:
                return
            self._timer.cancel()
        self._armed_ns = due_ns
        wait_s = max(0.0, (due_ns - time.perf_counter_ns()) / 1e9)
        self._timer = asyncio.get_running_loop().call_later(wait_s, self._write_due)

    def _write_due(self) -> None:
        self._timer = None
        now_ns = time.perf_counter_ns()
        while self._due and self._due[0][0] <= now_ns:
            due_ns, number, stream = self._due[0]
            if not stream.connection.open:
                heapq.heappop(self._due)
                continue
            if len(self._late_ns) < MOST_SAMPLES:
                self._late_ns.append(time.perf_counter_ns() - due_ns)
            self._written += 1
            if stream.at_last:
                heapq.heappop(self._due)  # before it is written: its connection may then begin another
                self._finished += 1
                stream.write()
            else:
                stream.write()
                heapq.heapreplace(self._due, (stream.due_ns, number, stream))
        self._arm()

    def models(self) -> dict[str, Any]:
        """The page /v1/models."""
        card = {"id": MODEL, "object": "model", "owned_by": "backbench-null", "max_model_len": MAX_LEN}
        return {"object": "list", "data": [card | {"vocab_size": VOCAB_SIZE}]}

    def metrics(self) -> str:
        """The page /metrics: what a scraper of any server looks for."""
        running = len(self._due)
        return (
            "# TYPE null:num_requests_running gauge\n"
            f"null:num_requests_running {running}\n"
            "# TYPE null:generation_tokens_total counter\n"
            f"null:generation_tokens_total {self._written}\n"
            "# TYPE null:request_success_total counter\n"
            f"null:request_success_total {self._finished}\n"
        )

    def stats(self) -> dict[str, Any]:
        """The page /stats: how late the server itself was since the last look, and what it cost."""
        late, self._late_ns = self._late_ns, []
        found: dict[str, Any] = {"tokens": len(late), "cpu_s": time.process_time()}
        if late:
            p50, p99 = np.quantile(late, (0.5, 0.99)) / 1e9
            found |= {"late_p50_s": float(p50), "late_p99_s": float(p99), "late_max_s": max(late) / 1e9}
        return found


async def serve(script: Script, host: str = "127.0.0.1", port: int = 0) -> None:
    """Serve until SIGTERM or SIGINT; the first line on stdout is the address."""
    allow_many_files()
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    null = NullServer(script)
    server = await loop.create_server(lambda: Connection(null), host, port, backlog=4096)
    bound = server.sockets[0].getsockname()[1]
    name = f"[{host}]" if ":" in host else host
    print(f"http://{name}:{bound}/v1", flush=True)
    await stop.wait()
    server.close()


def _main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description="A server with scripted times; see `bench null-server`.")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--ttft", type=float, default=Script.ttft_s)
    parser.add_argument("--itl", type=float, default=Script.itl_s)
    given = parser.parse_args(arguments)
    asyncio.run(serve(Script(given.ttft, given.itl), port=given.port))


if __name__ == "__main__":
    _main(sys.argv[1:])
