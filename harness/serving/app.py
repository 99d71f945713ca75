"""The routes of `bench serve`, as an ASGI application."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from backbench.errors import shown
from backbench.harness.serving.chat import chat
from backbench.harness.serving.completions import completions
from backbench.harness.serving.front import Front
from backbench.harness.serving.metrics import CONTENT_TYPE, OWN, VLLM
from backbench.harness.serving.protocol import Fields, Refused, read_json, read_messages

LONGEST_REQUEST_ID = 256
"""Characters of an x-request-id that is sent back."""
CLIENT_GONE = 499
"""Status of an answer that nobody waits for."""
Serve = Callable[[Front, Fields, Request], Awaitable[Response]]


def make_app(
    front: Front, *, max_body_bytes: int, api_key: str | None = None, vllm_metrics: bool = False
) -> Starlette:
    """The application that serves `front`, whose context it enters as its lifespan.

    max_body_bytes: longer bodies are answered 413. api_key: asked of every route but /health.
    vllm_metrics: /metrics has every metric under vLLM's name, too.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with front:
            yield

    def posted(path: str, serve: Serve) -> Route:
        async def endpoint(request: Request) -> Response:
            request.state.arrived_ns = time.perf_counter_ns()
            return await serve(front, read_json(await read_body(request, max_body_bytes)), request)

        return Route(path, endpoint, methods=["POST"])

    async def health(request: Request) -> Response:
        return Response(status_code=200 if front.failure is None else 503)

    async def metrics(request: Request) -> Response:
        prefixes = (OWN, VLLM) if vllm_metrics else (OWN,)
        return Response(front.metrics.text(prefixes), media_type=CONTENT_TYPE)

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model(front, name) for name in front.names]})

    return Starlette(
        routes=[
            posted("/v1/completions", completions),
            posted("/v1/chat/completions", chat),
            posted("/tokenize", tokenize),
            posted("/detokenize", detokenize),
            Route("/v1/models", models),
            Route("/health", health),
            Route("/metrics", metrics),
        ],
        middleware=[Middleware(Door, api_key=api_key)],
        exception_handlers={
            Refused: _refused,
            RecursionError: _too_deep,
            HTTPException: _http_error,
            ClientDisconnect: _gone,
            Exception: _failed,
        },
        lifespan=lifespan,
    )


def _model(front: Front, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": front.created_s,
        "owned_by": "backbench",
        "root": front.names[0],
        "parent": None,
        "max_model_len": front.engine.limits.max_len,
        "vocab_size": front.engine.model_config.vocab_size,
    }


async def tokenize(front: Front, fields: Fields, request: Request) -> Response:
    """`/tokenize`, as vLLM words it: a prompt or messages to token ids."""
    front.require_model(fields)
    if fields.has("messages"):
        messages = read_messages(fields)
        template = {
            "add_generation_prompt": fields.switch("add_generation_prompt", True),
            "add_special_tokens": fields.switch("add_special_tokens", False),
        }
        with_texts = fields.switch("return_token_strs", False)
        fields.end()
        token_ids = await front.encode_chat(messages, **template)
    else:
        prompt = fields.text("prompt")
        if prompt is None:
            raise Refused("Give a prompt or messages.", parameter="prompt")
        add_special_tokens = fields.switch("add_special_tokens", True)
        with_texts = fields.switch("return_token_strs", False)
        fields.end()
        (token_ids,) = await front.encode([prompt], add_special_tokens=add_special_tokens)
    answer = {
        "count": len(token_ids),
        "max_model_len": front.engine.limits.max_len,
        "tokens": token_ids,
        "token_strs": front.tokenizer.convert_ids_to_tokens(token_ids) if with_texts else None,
    }
    return JSONResponse(answer)


async def detokenize(front: Front, fields: Fields, request: Request) -> Response:
    """`/detokenize`, as vLLM words it: token ids to text."""
    front.require_model(fields)
    if not fields.has("tokens"):
        raise Refused("Give the tokens.", parameter="tokens")
    token_ids = fields.token_ids("tokens", front.engine.limits.max_len)
    fields.end()
    return JSONResponse({"prompt": front.decode(token_ids)})


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body; Refused once it is longer than `limit` bytes."""
    declared = request.headers.get("content-length", "")
    too_long = Refused(
        f"The body is longer than {limit:,} bytes (--max-body-bytes).", status=413, kind="body_too_large"
    )
    if declared.isdecimal() and int(declared) > limit:
        raise too_long
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_long
    return bytes(body)


class Door:
    """Lets in who knows the key, and sends every answer back with its request's x-request-id."""

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app = app
        self._key = None if api_key is None else _digest(f"Bearer {api_key}")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")[:LONGEST_REQUEST_ID]
        name = given if given.isascii() and given.isprintable() and given.strip() else uuid4().hex

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", name.encode())]
            await send(message)

        if self._key is None or scope["path"] == "/health" or self._knows(headers):
            await self._app(scope, receive, send_named)
            return
        refused = Refused(
            "The API key is missing or wrong; send it as `Authorization: Bearer KEY`.",
            status=401,
            kind="authentication_error",
            headers={"www-authenticate": "Bearer"},
        )
        await _answer(refused)(scope, receive, send_named)

    def _knows(self, headers: Headers) -> bool:
        """Digests are compared, all alike in length, in a time that says nothing of how near a guess is."""
        assert self._key is not None
        return hmac.compare_digest(_digest(headers.get("authorization", "")), self._key)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _answer(refused: Refused) -> Response:
    return JSONResponse(refused.body(), refused.status, refused.headers)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return _answer(error)


async def _too_deep(request: Request, error: Exception) -> Response:
    return _answer(Refused("The body is nested too deeply."))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = f"{request.method} {shown(request.url.path, 100)}: {error.detail}."
    return _answer(Refused(said, status=error.status_code, kind="not_found_error", headers=error.headers))


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)


async def _failed(request: Request, error: Exception) -> Response:
    return _answer(Refused(f"The server failed: {error}", status=500, kind="internal_error"))
