"""One request before it has tokens: what trace readers yield and transformations change."""

from __future__ import annotations

from dataclasses import dataclass, replace

LATEST_NS = 2**62
"""Arrivals lie below it, 146 years after the start: the content hash and the record keep them as int64."""


@dataclass(frozen=True)
class Segment:
    """The first `tokens` tokens of a named token stream."""

    stream: str
    index: int
    tokens: int


@dataclass(frozen=True)
class Follow:
    """What a later turn waits for, and the context that its prompt continues; rows go by their `key`."""

    row: str
    """The row whose answer must have ended before. It stands earlier in the trace."""
    think_ns: int | None
    """How long after that; None = the turn has a recorded time, and waits only where that is too soon."""
    context: str
    """The row whose context the prompt begins with: its prompt, then its answer. Mostly the same row."""
    kept_tokens: int
    """So many first tokens of that context."""


@dataclass(frozen=True)
class TraceRow:
    """Lengths, time and where the prompt's tokens come from.

    The prompt is `prompt` if given; otherwise it starts with the tokens of `segments`, then of `block_ids`,
    and the rest is the request's own. A later turn's starts with the context it keeps, in their place.
    """

    input_tokens: int
    output_tokens: int
    arrival_ns: int = 0
    """After the start of the trace; of a turn with a think time, as if answers took no time."""
    prompt: tuple[int, ...] | None = None
    """Token ids; of a later turn, those it adds to the context it keeps."""
    block_ids: tuple[int, ...] = ()
    """The same id means the same `block_tokens` tokens."""
    block_tokens: int = 0
    segments: tuple[Segment, ...] = ()
    """Rows that name the same streams share those tokens: prefixes."""
    session: str | None = None
    temperature: float | None = None
    seed: int | None = None
    """Of its sampling; None = drawn."""
    key: str | None = None
    """Its name for the turns that follow it."""
    follow: Follow | None = None
    """None = it waits for no answer."""
    answer: tuple[int, ...] | None = None
    """The recorded answer's token ids, for turns whose target gives none; None = drawn."""


def follow_recorded(before: TraceRow, row: TraceRow, think_ns: int | None) -> Follow:
    """`row` as the turn after `before`, which has a key.

    Whole blocks in common are kept. Where they hold all of the prompt before and there is room for its
    answer, or where there are no ids and there is room for both, the turn continues that context.
    """
    assert before.key is not None
    context_tokens = before.input_tokens + before.output_tokens
    size = max(row.block_tokens, 1)
    common = 0
    for one, other in zip(before.block_ids, row.block_ids, strict=False):
        if one != other:
            break
        common += 1
    continues = not row.block_ids or common >= before.input_tokens // size
    if continues and row.input_tokens >= context_tokens:
        kept_tokens = context_tokens
    else:
        kept_tokens = min(common * size, before.input_tokens)
    return Follow(before.key, think_ns, before.key, kept_tokens)


def named_apart(row: TraceRow, part: str) -> TraceRow:
    """The row as one of a mix's `part`: its session, and the names that turns follow, are that part's own."""
    follow = row.follow
    if follow is not None:
        follow = replace(follow, row=f"{part}/{follow.row}", context=f"{part}/{follow.context}")
    return replace(
        row,
        session=None if row.session is None else f"{part}/{row.session}",
        key=None if row.key is None else f"{part}/{row.key}",
        follow=follow,
    )
