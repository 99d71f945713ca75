"""Sessions in files: turns that name a wait after the answer before them, and blocks they are made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from backbench.errors import WorkloadError, shown
from backbench.workloads.trace import Segment, TraceRow

WAIT_NOTE = "a turn is offered its wait after the turn before it was; answers take no time there."
BLOCK_SIZES = (512, 16, 32, 64, 128, 256, 1024, 2048)
"""Tokens a block may hold; 512 where it fits."""


@dataclass
class Session:
    """What is known of a session so far, while its turns are read one by one."""

    name: str | None
    """None: its requests share nothing, and none waits for another."""
    context: tuple[Segment, ...] = ()
    """The prompt and the answer of the turn before."""
    messages: list[tuple[str, str]] = field(default_factory=list)
    """Role and content of what was said; the answers are not known."""
    turns: int = 0
    arrival_ns: int | None = None
    """When the latest turn is offered; None: no turn says when it starts."""

    def turn(self, row: TraceRow, start_ns: int | None, wait_ns: int) -> TraceRow:
        """The next turn: at `start_ns`, or `wait_ns` after the turn before was offered."""
        if start_ns is None and self.arrival_ns is not None:
            start_ns = self.arrival_ns + wait_ns
        self.arrival_ns = start_ns
        self.turns += 1
        return replace(row, arrival_ns=start_ns or 0, session=self.name)

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
