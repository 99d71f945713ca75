"""One request before it has tokens: what trace readers yield and transformations change."""

from __future__ import annotations

from dataclasses import dataclass

LATEST_NS = 2**62
"""Arrivals lie below it, 146 years after the start: the content hash and the record keep them as int64."""


@dataclass(frozen=True)
class Segment:
    """The first `tokens` tokens of a named token stream."""

    stream: str
    index: int
    tokens: int


@dataclass(frozen=True)
class TraceRow:
    """Lengths, time and where the prompt's tokens come from.

    The prompt is `prompt` if given; otherwise it starts with the tokens of `segments` or of `block_ids`, and
    the rest is the request's own.
    """

    input_tokens: int
    output_tokens: int
    arrival_ns: int = 0
    """After the start of the trace."""
    prompt: tuple[int, ...] | None = None
    block_ids: tuple[int, ...] = ()
    """The same id means the same `block_tokens` tokens."""
    block_tokens: int = 0
    segments: tuple[Segment, ...] = ()
    """Rows that name the same streams share those tokens: prefixes, and the turns of a session."""
    session: str | None = None
    temperature: float | None = None
    seed: int | None = None
    """Of its sampling; None = drawn."""
