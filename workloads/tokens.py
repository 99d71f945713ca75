"""Prompt tokens: synthetic, uniform over the vocabulary, a function of the seed alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from backbench.workloads.request import Request
from backbench.workloads.streams import stream
from backbench.workloads.trace import TraceRow


class TokenSource:
    """Makes the prompts of one workload. Keeps the trace blocks it has made, as they repeat."""

    def __init__(self, seed: int, vocab_size: int) -> None:
        self.seed = seed
        self.vocab_size = vocab_size
        self._blocks: dict[tuple[int, int], tuple[int, ...]] = {}
        # One int object an id, shared by all prompts: 8 bytes a token instead of 36.
        self._ids = np.arange(vocab_size).astype(object)

    def draw(self, name: str, index: int, count: int) -> tuple[int, ...]:
        """The first `count` tokens of a stream; more of the same stream only appends."""
        drawn = stream(self.seed, name, index).integers(self.vocab_size, size=count)
        return tuple(self._ids[drawn].tolist())

    def block(self, block_id: int, block_tokens: int) -> tuple[int, ...]:
        """The tokens of a trace block."""
        key = (block_id, block_tokens)
        if key not in self._blocks:
            self._blocks[key] = self.draw(f"block/{block_tokens}", block_id, block_tokens)
        return self._blocks[key]

    def prompt(self, index: int, row: TraceRow, context: tuple[int, ...] = ()) -> tuple[int, ...]:
        """The prompt of the request at position `index`: `context`, then its own tokens.

        Exactly `row.input_tokens` of them, but for recorded text, whose own part is what it is.
        """
        count = row.input_tokens
        if row.prompt is not None:
            return (context + row.prompt)[:count]
        recorded: tuple[int, ...] = ()
        for part in row.segments:
            recorded += self.draw(part.stream, part.index, min(part.tokens, count - len(recorded)))
        if row.block_ids:
            needed = -(-count // row.block_tokens)
            blocks = (self.block(i, row.block_tokens) for i in row.block_ids[:needed])
            recorded += tuple(token for block in blocks for token in block)[len(recorded) : count]
        head = context[:count] + recorded[len(context) :]
        return head + self.draw("prompt", index, count - len(head))

    def answer(self, index: int, row: TraceRow) -> tuple[int, ...]:
        """What stands for its answer in later turns until the real one is known."""
        return self.draw("answer", index, row.output_tokens) if row.answer is None else row.answer


def content_hash(requests: Iterable[Request]) -> str:
    """SHA-256 (hex) of the realised stream: arrival ns, token ids and output lengths, in order.

    Each request enters as little-endian int64 (arrival, prompt length, output length) and int32 ids, so the
    value does not depend on machine, process or how the requests were made. A later turn enters with four
    more int64: the request it follows, think time, the one whose context it extends (-1: none), kept tokens.
    """
    digest = hashlib.sha256(b"backbench workload 1\n")
    for request in requests:
        lengths = (request.arrival_ns, len(request.prompt), request.output_tokens)
        digest.update(np.array(lengths, dtype="<i8").tobytes())
        digest.update(np.array(request.prompt, dtype="<i4").tobytes())
        if request.follows is not None:
            extends = -1 if request.extends is None else request.extends
            turn = (request.follows, request.think_ns, extends, request.kept_tokens)
            digest.update(np.array(turn, dtype="<i8").tobytes())
    return digest.hexdigest()
