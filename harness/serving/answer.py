"""What both kinds of completions share: an answer's sequences, and how it reaches the client."""

from __future__ import annotations

import asyncio
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import AbstractContextManager, aclosing
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from backbench.engine.async_engine import Tokens
from backbench.engine.request import SamplingParams, Token
from backbench.harness.serving.front import Front
from backbench.harness.serving.protocol import Delivery, Refused
from backbench.harness.serving.text import REPLACEMENT, TextStream

LEAST_LOGPROB = -9999.0
"""What stands for a log-probability of minus infinity, which JSON lacks."""
DONE = b"data: [DONE]\n\n"
ADMITTED = b""
"""In place of an event: the request is being computed, and the answer's head can go out meanwhile."""
Result = TypeVar("Result")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NewToken:
    """One token as an answer shows it."""

    token_id: int
    text: str
    """Of the sequence, that became certain with it; may be empty, and more or less than the token's own."""
    logprob: float | None
    finish_reason: str | None


@dataclass
class Choice:
    """One sequence of an answer."""

    text_stream: TextStream
    tokens: list[NewToken] = field(default_factory=list)
    length: int = 0
    """Characters of its text so far."""

    def push(self, token: Token) -> NewToken:
        """Add its next token."""
        text = self.text_stream.push(token.token_id, token.finish_reason)
        logprob = None if token.logprob is None else max(token.logprob, LEAST_LOGPROB)
        new = NewToken(token.token_id, text, logprob, token.finish_reason)
        self.tokens.append(new)
        self.length += len(text)
        return new

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)

    @property
    def finish_reason(self) -> str | None:
        return self.tokens[-1].finish_reason


class Choices:
    """The sequences of an answer by index: in the order of prompts, and of n within one."""

    def __init__(self, front: Front, prompts: list[list[int]], params: SamplingParams, how: Delivery) -> None:
        self._tokenizer = front.tokenizer
        self._draft_tokens = front.engine.limits.draft_tokens
        self._params = params
        self._how = how
        self._prompt_tokens = sum(map(len, prompts))
        self._num_sequences = len(prompts) * params.n
        self._num_tokens = 0
        self._begun: dict[int, Choice] = {}
        self._drafts: list[tuple[int, int]] = []
        """(tokens drafted, accepted) of each draft that was verified."""

    def push(self, token: Token) -> tuple[int, Choice, NewToken]:
        """Add a token; returns its sequence's index, the sequence, and the token as it is shown."""
        self._num_tokens += 1
        if token.draft is not None:
            self._drafts.append(token.draft)
        index = prompt_index(token.request_id) * self._params.n + token.sequence
        choice = self._begun.get(index)
        if choice is None:
            choice = self._begun[index] = Choice(self._text_stream())
        return index, choice, choice.push(token)

    def _text_stream(self) -> TextStream:
        how = self._how
        return TextStream(
            self._tokenizer,
            self._params.stop,
            skip_special_tokens=how.skip_special_tokens,
            keep_stop=how.keep_stop,
        )

    def all(self) -> list[tuple[int, Choice]]:
        """Those that have begun, in order."""
        return sorted(self._begun.items())

    def usage(self) -> dict[str, int]:
        """Tokens so far: a prompt counts once, however many sequences it has."""
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._num_tokens,
            "total_tokens": self._prompt_tokens + self._num_tokens,
        }

    def metrics(self) -> dict[str, Any]:
        """What became of its drafts; nothing where it had none, or where it has several sequences."""
        if not self._drafts or self._num_sequences > 1:
            return {}
        return {"metrics": {"speculative_decoding": speculative_decoding(self._drafts, self._draft_tokens)}}


class Answer(ABC):
    """One request's answer, whole or token by token. How it is worded is the subclass's."""

    def __init__(
        self,
        front: Front,
        prompts: list[list[int]],
        params: SamplingParams,
        how: Delivery,
        arrived_ns: int,
        *,
        alternatives: bool = False,
    ) -> None:
        """arrived_ns: when the request came, before its body was read.

        alternatives: beside a token's log-probability stands that of the most likely token.
        """
        self.front = front
        self.params = params
        self.alternatives = alternatives
        self._prompts = prompts
        self._how = how
        self._arrived_ns = arrived_ns
        self._choices = Choices(front, prompts, params, how)

    @abstractmethod
    def head(self, streamed: bool) -> dict[str, Any]:
        """The fields besides choices and usage; `id` is among them."""

    @abstractmethod
    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        """A finished sequence."""

    @abstractmethod
    def chunk(self, index: int, choice: Choice, new: NewToken) -> dict[str, Any]:
        """A sequence's next token."""

    async def respond(self, request: Request) -> Response:
        """What the client is sent; raises ClientDisconnect where it has gone."""
        if self._how.stream:
            return EventStream(self._events())
        whole = await unless_gone(request.receive, self._whole())
        return Response(encode_json(whole), media_type="application/json")

    def _serving(self, name: str) -> AbstractContextManager[Tokens]:
        asked = {request_id(name, index): prompt for index, prompt in enumerate(self._prompts)}
        return self.front.serve(asked, self.params, self._arrived_ns)

    def _ids(self, tokens: list[NewToken]) -> dict[str, list[int]]:
        return {"token_ids": [token.token_id for token in tokens]} if self._how.token_ids else {}

    async def _whole(self) -> dict[str, Any]:
        head = self.head(streamed=False)
        with self._serving(head["id"]) as tokens:
            async for token in tokens:
                self._choices.push(token)
        choices = [
            self.choice(index, choice) | self._ids(choice.tokens) for index, choice in self._choices.all()
        ]
        return head | {"choices": choices, "usage": self._choices.usage()} | self._choices.metrics()

    async def _events(self) -> AsyncGenerator[bytes, None]:
        head = self.head(streamed=True)
        with self._serving(head["id"]) as tokens:
            yield ADMITTED
            async for token in tokens:
                index, choice, new = self._choices.push(token)
                usage = {"usage": self._choices.usage()} if self._how.continuous_usage else {}
                yield event(head | {"choices": [self.chunk(index, choice, new) | self._ids([new])]} | usage)
        if self._how.include_usage:
            last = {"choices": [], "usage": self._choices.usage()}
            yield event(head | last | self._choices.metrics())
        yield DONE


def speculative_decoding(drafts: Sequence[tuple[int, int]], most: int) -> dict[str, Any]:
    """A sequence's drafts, (tokens drafted, accepted) each, `most` tokens at once, as vLLM words them.

    The mean length has the model's own token in it, the bonus.
    """
    drafted, accepted = sum(drafted for drafted, _ in drafts), [accepted for _, accepted in drafts]
    return {
        "mean_acceptance_length": 1 + sum(accepted) / len(drafts),
        "draft_acceptance_rate": sum(accepted) / drafted,
        "acceptance_histogram": [accepted.count(count) for count in range(most + 1)],
        "num_spec_steps": len(drafts),
        "num_accepted_draft_tokens": sum(accepted),
        "num_draft_tokens": drafted,
        "num_spec_tokens": most,
    }


def token_text(tokenizer: Any, token_id: int) -> tuple[str, list[int] | None]:
    """A token's own text and its bytes; None where it holds a part of a character only."""
    text = str(tokenizer.decode([token_id]))
    return text, None if REPLACEMENT in text else list(text.encode())


def request_id(name: str, index: int) -> str:
    """What the engine calls a prompt of the answer `name`."""
    return f"{name}-{index}"


def prompt_index(request_id: str) -> int:
    """Which of its answer's prompts it is."""
    return int(request_id.rpartition("-")[2])


def event(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + encode_json(value) + b"\n\n"


def encode_json(value: Any) -> bytes:
    """JSON as it is sent."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


class EventStream(Response):
    """Server-sent events, each written by itself. A client that leaves ends what makes them."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        """An error before the first of them is answered as such; a later one is the last event."""
        self.status_code = 200
        self.background = None
        self._events = events
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def send_all() -> None:
            nonlocal started
            async with aclosing(self._events) as events:
                async for each in events:
                    if not started:
                        started = True
                        await send(
                            {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
                        )
                    if each is not ADMITTED:
                        await send({"type": "http.response.body", "body": each, "more_body": True})

        try:
            await unless_gone(receive, send_all())
        except ClientDisconnect:
            return
        except Exception as error:
            if not started:
                raise
            logger.exception("A stream ended early.")
            failed = Refused(f"The engine failed: {error}", status=500, kind="internal_error")
            await send({"type": "http.response.body", "body": event(failed.body()), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """What `work` returns; where the client disconnects first, cancel it and raise ClientDisconnect."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
