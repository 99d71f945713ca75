"""`/v1/completions`: text or token ids in, text out."""

from __future__ import annotations

import time
from typing import Any
from uuid import uuid4

from starlette.requests import Request
from starlette.responses import Response

from backbench.harness.serving.answer import Answer, Choice, NewToken, token_text
from backbench.harness.serving.front import Front
from backbench.harness.serving.protocol import (
    COMPLETION_TOKENS,
    Fields,
    read_delivery,
    read_prompts,
    read_sampling,
    require_alternatives,
)


async def completions(front: Front, fields: Fields, request: Request) -> Response:
    """Answer one request, whose head was read at `request.state.arrived_ns`."""
    front.require_model(fields)
    asked = read_prompts(fields)
    logprobs = fields.whole("logprobs", 0) if fields.has("logprobs") else None
    sampling = read_sampling(
        fields, front.random_seed(), default_tokens=COMPLETION_TOKENS, logprobs=logprobs is not None
    )
    require_alternatives(logprobs or 0, sampling.others["temperature"], "logprobs")
    how = read_delivery(fields)
    add_special_tokens = fields.switch("add_special_tokens", True)
    fields.end()
    params = sampling.params(COMPLETION_TOKENS)
    front.require_places(len(asked) * params.n)
    prompts = await front.encode(asked, add_special_tokens=add_special_tokens)
    arrived_ns = request.state.arrived_ns
    answer = CompletionAnswer(front, prompts, params, how, arrived_ns, alternatives=bool(logprobs))
    return await answer.respond(request)


class CompletionAnswer(Answer):
    """OpenAI's object `text_completion`."""

    def head(self, streamed: bool) -> dict[str, Any]:
        return {
            "id": f"cmpl-{uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.front.names[0],
        }

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        return self._part(index, choice.tokens, offset=0)

    def chunk(self, index: int, choice: Choice, new: NewToken) -> dict[str, Any]:
        return self._part(index, [new], offset=choice.length - len(new.text))

    def _part(self, index: int, tokens: list[NewToken], *, offset: int) -> dict[str, Any]:
        """Tokens of a sequence whose text begins `offset` characters behind its beginning."""
        return {
            "index": index,
            "text": "".join(token.text for token in tokens),
            "logprobs": self._logprobs(tokens, offset) if self.params.logprobs else None,
            "finish_reason": tokens[-1].finish_reason,
        }

    def _logprobs(self, tokens: list[NewToken], offset: int) -> dict[str, Any]:
        texts = [token_text(self.front.tokenizer, token.token_id)[0] for token in tokens]
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token.text)
        values = [token.logprob for token in tokens]
        top = [{text: value} for text, value in zip(texts, values, strict=True)]
        return {
            "text_offset": offsets,
            "token_logprobs": values,
            "tokens": texts,
            "top_logprobs": top if self.alternatives else None,
        }
