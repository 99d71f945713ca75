"""Sessions in files: turns that wait for the answer before them, and the blocks that prompts are made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from backbench.errors import WorkloadError, shown
from backbench.workloads.trace import Segment, TraceRow, follow_recorded

BLOCK_SIZES = (512, 16, 32, 64, 128, 256, 1024, 2048)
"""Tokens a block may hold; 512 where it fits."""


@dataclass
class Session:
    """What is known of a session so far, while its turns are read one by one."""

    name: str | None
    """None: its requests share nothing, and none waits for another."""
    turns: int = 0
    before: TraceRow | None = None
    """The latest turn."""
    context: tuple[Segment, ...] = ()
    """What that turn's prompt and answer are made of, where turns name only what they add."""

    @property
    def context_tokens(self) -> int:
        """Tokens of the latest turn's prompt and answer."""
        return 0 if self.before is None else self.before.input_tokens + self.before.output_tokens

    def turn(
        self, row: TraceRow, start_ns: int | None, wait_ns: int = 0, kept_tokens: int | None = None
    ) -> TraceRow:
        """The next turn: at `start_ns`, or `wait_ns` after the answer before it.

        Its prompt begins with `kept_tokens` of the context before it; None: with what ids and lengths tell.
        """
        if self.name is None:
            return replace(row, arrival_ns=start_ns or 0)
        before, think_ns = self.before, None if start_ns is not None else wait_ns
        if before is not None and start_ns is None:
            start_ns = before.arrival_ns + wait_ns
        key = f"{self.name}/{self.turns}"
        row = replace(row, arrival_ns=start_ns or 0, session=self.name, key=key)
        if before is not None:
            follow = follow_recorded(before, row, think_ns)
            kept = follow.kept_tokens if kept_tokens is None else kept_tokens
            row = replace(row, follow=replace(follow, kept_tokens=kept))
        self.turns += 1
        self.before = row
        return row

    def grown(self, added: Sequence[Segment], output_tokens: int) -> tuple[Segment, ...]:
        """The prompt of a turn that adds only what is new; its answer is part of the next one's."""
        prompt = (*self.context, *added)
        answer = Segment(f"session/{self.name}/{self.turns}/output", 0, output_tokens)
        self.context = (*prompt, answer)
        return prompt


def block_segments(block_ids: Iterable[int], block_tokens: int, tokens: int) -> tuple[Segment, ...]:
    """The first `tokens` tokens of those blocks: the same ones as of rows that name the ids alone."""
    segments = []
    for block_id in block_ids:
        segments.append(Segment(f"block/{block_tokens}", block_id, min(block_tokens, tokens)))
        tokens -= block_tokens
    return tuple(segments)


def block_size(path: Path, rows: Iterable[tuple[int, int]]) -> int:
    """The size of blocks that fits every row's tokens and number of ids; 512 where none fits.

    Raises:
        WorkloadError: several sizes but not 512 do.
    """
    known = set(rows)
    fitting = [size for size in BLOCK_SIZES if all(-(-tokens // size) == count for tokens, count in known)]
    if len(fitting) > 1 and fitting[0] != BLOCK_SIZES[0]:
        raise WorkloadError(
            f"{shown(str(path), 150)}: blocks of {' or '.join(map(str, fitting))} tokens fit its hash_ids; "
            "give a longer part of the trace."
        )
    # Where none fits, a row is wrong, and is named as it is read.
    return fitting[0] if fitting else BLOCK_SIZES[0]
