"""One engine as HTTP sees it: names, tokenizer, a bounded queue, and counts."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from backbench.engine.async_engine import AsyncEngine, StepReport, Tokens
from backbench.engine.engine import Engine
from backbench.engine.request import SamplingParams, as_token_ids
from backbench.errors import EngineError, shown
from backbench.harness.serving.metrics import ServingMetrics
from backbench.harness.serving.protocol import Fields, Refused

RETRY_AFTER_S = 1
"""What a client is told that comes when the queue is full: a place may be free with the next step."""


class Front:
    """Takes requests for one engine while its context is entered.

    async with front:
        with front.serve({"cmpl-1-0": prompt}, params, arrived_ns) as tokens:
            async for token in tokens:
                ...
    """

    def __init__(self, engine: Engine, names: Sequence[str], *, max_queue: int) -> None:
        """names: what the model is called, the first in answers. max_queue: sequences that may wait."""
        self.engine = engine
        self.tokenizer: Any = engine.tokenizer
        self.names = tuple(names)
        self.most_sequences = engine.limits.max_seqs + max_queue
        """Running and waiting."""
        self.created_s = int(time.time())
        self.metrics = ServingMetrics(engine, self.names[0])
        self._sequences = 0
        self._async_engine = AsyncEngine(engine, self._observe)
        # One thread: a tokenizer is not made for several, and one keeps the order of arrival.
        self._tokenizing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")

    async def __aenter__(self) -> Front:
        await self._async_engine.__aenter__()
        return self

    async def __aexit__(self, *failure: Any) -> None:
        await self._async_engine.__aexit__(*failure)
        self._tokenizing.shutdown()

    @property
    def failure(self) -> Exception | None:
        """What ended the engine, after which nothing is served; also a device that was lost while idle."""
        ranks = self.engine.ranks
        if self._async_engine.failure is None and ranks is not None and ranks.team.fault is not None:
            return EngineError(ranks.team.fault)
        return self._async_engine.failure

    @property
    def num_sequences(self) -> int:
        """Sequences that run or wait."""
        return self._sequences

    def _observe(self, report: StepReport) -> None:
        """Its tokens were just handed to their streams: no client could have had them before."""
        self.metrics.observe(report, time.perf_counter_ns())

    def require_model(self, fields: Fields) -> None:
        """Refuse a request for another model."""
        name = fields.text("model")
        if name is not None and name not in self.names:
            known = ", ".join(self.names)
            raise Refused(
                f"The model {shown(name)} is not served here; there is {known}.",
                status=404,
                kind="not_found_error",
                parameter="model",
            )

    def require_places(self, num_sequences: int) -> None:
        """Refuse what could not be served even by an idle engine."""
        if num_sequences > self.most_sequences:
            raise Refused(
                f"{num_sequences:,} sequences are more than the {self.most_sequences:,} that may run and "
                "wait; ask for fewer at once."
            )

    def random_seed(self) -> int:
        """For requests that give none."""
        return secrets.randbits(62)

    async def encode(
        self, prompts: Sequence[str | list[int]], *, add_special_tokens: bool
    ) -> list[list[int]]:
        """Each prompt as token ids; texts are tokenized beside the event loop."""

        def encoded(prompt: str | list[int]) -> list[int]:
            if isinstance(prompt, list):
                return prompt
            return list(self.tokenizer.encode(prompt, add_special_tokens=add_special_tokens))

        if not any(isinstance(prompt, str) for prompt in prompts):
            return [prompt for prompt in prompts if isinstance(prompt, list)]
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._tokenizing, lambda: [encoded(each) for each in prompts])

    async def encode_chat(
        self, messages: list[dict[str, str]], *, add_generation_prompt: bool, add_special_tokens: bool
    ) -> list[int]:
        """The messages in the tokenizer's chat template, as token ids."""
        from jinja2 import TemplateError

        if not self.tokenizer.chat_template:
            raise Refused(f"The model {self.names[0]} has no chat template; use /v1/completions.")
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            raise Refused(f"The model's chat template refuses the messages: {error}.") from None
        (token_ids,) = await self.encode([str(text)], add_special_tokens=add_special_tokens)
        return token_ids

    def room(self, prompt_len: int, n: int) -> int:
        """Output tokens that fit behind a prompt, in the context and in the KV pool."""
        pool = self.engine.pool
        held = (pool.num_blocks - (n > 1)) * pool.block_size + 1
        return min(self.engine.limits.max_len, held) - prompt_len

    @contextmanager
    def serve(
        self, asked: Mapping[str, list[int]], params: SamplingParams, arrived_ns: int
    ) -> Iterator[Tokens]:
        """Tokens of the prompts, by request id, as they come. Leaving the context early aborts them.

        arrived_ns: when they came, by `time.perf_counter_ns`, for the counts.
        Raises Refused, as it is entered, where they cannot be served or the queue is full.
        """
        if self.failure is not None:
            raise Refused("The engine has failed; nothing is served.", status=503, kind="internal_error")
        self.require_places(len(asked) * params.n)
        try:
            for request_id, prompt in asked.items():
                self.engine.check(request_id, prompt, params)
        except EngineError as error:
            raise Refused(str(error)) from None
        with self._admitted(asked, params.n, arrived_ns), self._async_engine.serve(asked, params) as tokens:
            yield tokens

    @contextmanager
    def _admitted(self, asked: Mapping[str, list[int]], n: int, arrived_ns: int) -> Iterator[None]:
        """Places for n sequences of each prompt, until all have ended."""
        num_sequences = len(asked) * n
        if self._sequences + num_sequences > self.most_sequences:
            self.metrics.refused()
            raise Refused(
                f"{self._sequences:,} sequences run or wait, and no more may; try again later.",
                status=429,
                kind="rate_limit_error",
                headers={"retry-after": str(RETRY_AFTER_S)},
            )
        self._sequences += num_sequences
        for request_id, prompt in asked.items():
            self.metrics.arrived(request_id, len(prompt), n, arrived_ns)
        try:
            yield
        finally:
            self._sequences -= num_sequences
            for request_id in asked:
                self.metrics.left(request_id)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included; Refused where one is not in the vocabulary."""
        try:
            known = as_token_ids(token_ids, "tokens", self.engine.model_config.vocab_size)
        except EngineError as error:
            raise Refused(str(error)) from None
        return str(self.tokenizer.decode(known))
