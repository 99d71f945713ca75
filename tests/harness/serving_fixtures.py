"""`tiny` behind the application of `bench serve`, asked in this process without a socket."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from starlette.applications import Starlette

from backbench.backends.interface.device import detect
from backbench.engine.config import EngineConfig
from backbench.engine.engine import Engine
from backbench.engine.models.checkpoint import find_model
from backbench.harness.serving.app import make_app
from backbench.harness.serving.front import Front

CONTEXT = 256
MAX_SEQS = 8
MAX_BODY_BYTES = 64 * 1024
PROMPT = "The first thing to say of this"
LINE = re.compile(
    r'(?P<name>[a-z0-9_:]+)\{model_name="tiny"(?:,(?P<label>[a-z_]+)="(?P<of>[^"]*)")?\} (?P<value>\S+)'
)
"""One sample of /metrics."""


@cache
def tiny_engine() -> Engine:
    """One engine for all tests of a process; every test leaves it without requests."""
    source = find_model("tiny")
    config = EngineConfig(max_seqs=MAX_SEQS, max_len=CONTEXT, num_blocks=64, max_step_tokens=256)
    return Engine.open(
        source, backend="torch", device=detect(prefer="cpu"), config=config, tokenizer=source.tokenizer()
    )


@dataclass
class Reply:
    """What the application sent."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    chunks: list[bytes] = field(default_factory=list)
    ended: bool = False

    @property
    def json(self) -> Any:
        return json.loads(b"".join(self.chunks))

    @property
    def error(self) -> str:
        return str(self.json["error"]["message"])

    @property
    def events(self) -> list[Any]:
        """The objects of a stream; that it ended as a stream ends is checked on the way."""
        *events, done = b"".join(self.chunks).removesuffix(b"\n\n").split(b"\n\n")
        assert done == b"data: [DONE]"
        return [json.loads(each.removeprefix(b"data: ")) for each in events]


@dataclass(frozen=True)
class Server:
    """An application whose lifespan has begun."""

    app: Starlette
    front: Front

    async def call(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: dict[str, str] | None = None,
        leave_after: int | None = None,
    ) -> Reply:
        """Send a request; `leave_after` chunks of its answer the client disconnects."""
        reply = Reply()
        gone = asyncio.Event()
        if leave_after == 0:
            gone.set()
        to_send = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            if to_send:
                return to_send.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                reply.status = message["status"]
                reply.headers = {name.decode(): value.decode() for name, value in message["headers"]}
                return
            if message["body"]:
                reply.chunks.append(message["body"])
            reply.ended = not message.get("more_body", False)
            if reply.ended or len(reply.chunks) == leave_after:
                gone.set()

        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        async with asyncio.timeout(60):
            await self.app(scope, receive, send)
        return reply

    async def post(self, path: str, fields: Any, **how: Any) -> Reply:
        return await self.call("POST", path, json.dumps(fields).encode(), **how)

    async def complete(self, **fields: Any) -> Reply:
        """A greedy completion of PROMPT unless said otherwise."""
        return await self.post("/v1/completions", {"prompt": PROMPT, "temperature": 0} | fields)

    async def chat(self, **fields: Any) -> Reply:
        """A greedy answer to PROMPT unless said otherwise."""
        asked = {"messages": [{"role": "user", "content": PROMPT}], "temperature": 0}
        return await self.post("/v1/chat/completions", asked | fields)

    async def idle(self) -> None:
        """Wait until the engine has nothing to do; fails where that takes longer than a moment."""
        engine = self.front.engine
        async with asyncio.timeout(20):
            while engine.has_work or engine.pool.num_used or self.front.num_sequences:
                await asyncio.sleep(0.005)
        engine.pool.check()


@asynccontextmanager
async def serving(
    *, engine: Engine | None = None, max_queue: int = 16, **app_options: Any
) -> AsyncIterator[Server]:
    """The application over an engine (None = that of all tests), which it leaves idle."""
    front = Front(engine or tiny_engine(), ["tiny", "other"], max_queue=max_queue)
    app = make_app(front, **({"max_body_bytes": MAX_BODY_BYTES} | app_options))
    server = Server(app, front)
    async with app.router.lifespan_context(app):
        yield server
        await server.idle()


def parse(text: str) -> dict[str, float]:
    """What /metrics says: name, or name[label], -> value; every line must be a comment or a sample."""
    found = {}
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        match = LINE.fullmatch(line)
        assert match is not None, line
        key = match["name"] + (f"[{match['of']}]" if match["label"] else "")
        assert key not in found
        found[key] = float(match["value"])
    return found
