"""One request before it has tokens: what trace readers yield and transformations change."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TraceRow:
    """Lengths, time and where the prompt's tokens come from.

    The prompt is `prompt` if given; otherwise it starts with the shared `prefix` and the tokens of
    `block_ids`, or is the head of the session's `history`, and the rest is the request's own.
    """

    input_tokens: int
    output_tokens: int
    arrival_ns: int = 0
    """After the start of the trace."""
    prompt: tuple[int, ...] | None = None
    block_ids: tuple[int, ...] = ()
    """The same id means the same `block_tokens` tokens."""
    block_tokens: int = 0
    prefix: tuple[int, int] | None = None
    """(group, tokens): rows of one group start with the same tokens."""
    history: str | None = None
    """Rows of one history are heads of one token stream: a later turn repeats the earlier ones."""
    session: str | None = None
    temperature: float | None = None
