"""`/v1/chat/completions`: messages in the model's chat template, one answer to them."""

from __future__ import annotations

import time
from typing import Any
from uuid import uuid4

from starlette.requests import Request
from starlette.responses import Response

from backbench.harness.serving.answer import Answer, Choice, NewToken, token_text
from backbench.harness.serving.front import Front
from backbench.harness.serving.protocol import (
    Fields,
    Refused,
    read_delivery,
    read_messages,
    read_sampling,
    require_alternatives,
)


async def chat(front: Front, fields: Fields, request: Request) -> Response:
    """Answer one request, whose head was read at `request.state.arrived_ns`. Where it gives no length, the
    answer may fill the context."""
    front.require_model(fields)
    messages = read_messages(fields)
    logprobs = fields.switch("logprobs", False)
    alternatives = fields.whole("top_logprobs", 0)
    if alternatives and not logprobs:
        raise Refused("top_logprobs needs logprobs to be true.", parameter="top_logprobs")
    sampling = read_sampling(fields, front.random_seed(), default_tokens=None, logprobs=logprobs)
    require_alternatives(alternatives, sampling.others["temperature"], "top_logprobs")
    how = read_delivery(fields)
    template = {
        "add_generation_prompt": fields.switch("add_generation_prompt", True),
        "add_special_tokens": fields.switch("add_special_tokens", False),
    }
    fields.end()
    token_ids = await front.encode_chat(messages, **template)
    params = sampling.params(front.room(len(token_ids), sampling.others["n"]))
    arrived_ns = request.state.arrived_ns
    answer = ChatAnswer(front, [token_ids], params, how, arrived_ns, alternatives=bool(alternatives))
    return await answer.respond(request)


class ChatAnswer(Answer):
    """OpenAI's objects `chat.completion` and `chat.completion.chunk`."""

    def head(self, streamed: bool) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{uuid4().hex}",
            "object": "chat.completion.chunk" if streamed else "chat.completion",
            "created": int(time.time()),
            "model": self.front.names[0],
        }

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": choice.text},
            "logprobs": self._logprobs(choice.tokens),
            "finish_reason": choice.finish_reason,
        }

    def chunk(self, index: int, choice: Choice, new: NewToken) -> dict[str, Any]:
        """The first token brings the role along, so that every event is a token."""
        role = {"role": "assistant"} if len(choice.tokens) == 1 else {}
        return {
            "index": index,
            "delta": role | {"content": new.text},
            "logprobs": self._logprobs([new]),
            "finish_reason": new.finish_reason,
        }

    def _logprobs(self, tokens: list[NewToken]) -> dict[str, Any] | None:
        if not self.params.logprobs:
            return None
        found = []
        for token in tokens:
            text, held = token_text(self.front.tokenizer, token.token_id)
            alone = {"token": text, "logprob": token.logprob, "bytes": held}
            found.append(alone | {"top_logprobs": [alone] if self.alternatives else []})
        return {"content": found}
