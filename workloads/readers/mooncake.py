"""Mooncake traces: JSONL with milliseconds, often on 3 s ticks, and ids of blocks of prompt tokens.

Its kin are read as well: without block ids, with blocks of another size, and with the turns of a session that
name a `delay` in ms after the answer before instead of a time. A turn with a time of its own waits for that
answer where it would come too soon.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from backbench.errors import WorkloadError, shown
from backbench.workloads.draft import TRACE_OPTIONS, Draft, draft_trace
from backbench.workloads.options import WorkloadOptions
from backbench.workloads.readers.format import Format, Head
from backbench.workloads.readers.text import BadRows, Clock, Place, read_jsonl, whole_list
from backbench.workloads.trace import TraceRow, follow_recorded

BLOCK_TOKENS = 512
OTHER_BLOCKS = (16, 32, 64, 128, 256, 1024, 2048)
HEAD_ROWS = 100
"""By so many rows the size of a block is told."""
TICK_NS = 3_000_000_000
MS = 1_000_000
FIELDS = ("timestamp", "input_length", "output_length", "hash_ids")
Line = tuple[Place, dict[str, Any]]


def draft_mooncake(path: Path, options: WorkloadOptions) -> Draft:
    """The file as a workload. Raises WorkloadError naming file, line and field."""
    bad = BadRows(skip=options.bad_rows == "skip")
    rows, block_tokens = _open(path, bad)
    source = {"kind": "mooncake", "data": path.name, "block_tokens": block_tokens}
    return draft_trace(path.name, rows, source, options, count=options.num_requests, tick_ns=TICK_NS, bad=bad)


def read_mooncake(path: Path, bad: BadRows | None = None) -> Iterator[TraceRow]:
    """Rows in order of time, as recorded. Raises WorkloadError naming file, line and field."""
    return _open(path, bad or BadRows())[0]


def _open(path: Path, bad: BadRows) -> tuple[Iterator[TraceRow], int | None]:
    """The rows, and the size of their blocks (None: they have no ids)."""
    lines = read_jsonl(path, ("input_length", "output_length"), bad)
    head = list(itertools.islice(lines, HEAD_ROWS))
    block_tokens = _block_tokens(path, head)
    rows = _rows(itertools.chain(head, lines), block_tokens, bad)
    if any("delay" in row for _, row in head):
        # Sessions interleave, and only their first turns say when they are.
        rows = iter(sorted(rows, key=lambda row: row.arrival_ns))
    return rows, block_tokens


def _rows(lines: Iterator[Line], block_tokens: int | None, bad: BadRows) -> Iterator[TraceRow]:
    clock = Clock("timestamp")
    turns: dict[str, TraceRow] = {}
    for number, (place, row) in enumerate(lines):
        with bad.row():
            session = None if row.get("session_id") is None else str(row["session_id"])
            if session is not None:
                place.require_encodable("session_id", session)
            before = None if session is None else turns.get(session)
            arrival_ns, think_ns = _times_ns(place, row, before, clock)
            input_tokens = place.whole("input_length", row["input_length"], 1)
            found = TraceRow(
                input_tokens=input_tokens,
                output_tokens=place.whole("output_length", row["output_length"], 1),
                arrival_ns=arrival_ns,
                block_ids=_block_ids(place, row, input_tokens, block_tokens),
                block_tokens=block_tokens or 0,
                session=session,
                key=None if session is None else f"row {number}",
            )
            if before is not None:
                found = replace(found, follow=follow_recorded(before, found, think_ns))
            if session is not None:
                turns[session] = found
            yield found


def _block_ids(
    place: Place, row: dict[str, Any], input_tokens: int, block_tokens: int | None
) -> tuple[int, ...]:
    if ("hash_ids" in row) != (block_tokens is not None):
        place.fail("hash_ids", "stands on some rows only; give all or none of them ids.")
    if block_tokens is None:
        return ()
    block_ids = whole_list(place, "hash_ids", row["hash_ids"])
    blocks = -(-input_tokens // block_tokens)
    if len(block_ids) != blocks:
        problem = f"{len(block_ids)} ids, but {input_tokens} tokens are {blocks} blocks of {block_tokens}."
        place.fail("hash_ids", problem)
    return block_ids


def _times_ns(
    place: Place, row: dict[str, Any], before: TraceRow | None, clock: Clock
) -> tuple[int, int | None]:
    """When the row is offered, if answers took no time; and its delay, where it has one instead of a time."""
    if "timestamp" in row:
        return clock.check(place, place.seconds_ns("timestamp", row["timestamp"], MS)), None
    if "delay" not in row:
        place.fail("timestamp", "is missing.")
    if before is None:
        place.fail("delay", "there is no turn of its session_id before it.")
    delay_ns = place.seconds_ns("delay", row["delay"], MS)
    return before.arrival_ns + delay_ns, delay_ns


def _block_tokens(path: Path, head: Sequence[Line]) -> int | None:
    """The size of block that fits every row of `head`, 512 where it does; None where no row has ids."""
    if not any("hash_ids" in row for _, row in head):
        return None
    rows = [
        (row["input_length"], len(row["hash_ids"]))
        for _, row in head
        if isinstance(row.get("hash_ids"), list) and isinstance(row["input_length"], int)
    ]
    if all(-(-tokens // BLOCK_TOKENS) == count for tokens, count in rows):
        return BLOCK_TOKENS
    fitting = [size for size in OTHER_BLOCKS if all(-(-tokens // size) == count for tokens, count in rows)]
    if len(fitting) > 1:
        raise WorkloadError(
            f"{shown(str(path), 150)}: blocks of {' or '.join(map(str, fitting))} tokens fit its hash_ids; "
            "give a longer part of the trace."
        )
    # Where none fits, a row is wrong, and is named as it is read.
    return fitting[0] if fitting else BLOCK_TOKENS


def _recognise(head: Head) -> int:
    known = head.fields & set(FIELDS)
    lengths = {"input_length", "output_length"} <= known
    return len(known) if "hash_ids" in known or lengths else 0


FORMAT = Format("mooncake", _recognise, TRACE_OPTIONS | {"tick", "bad_rows"}, draft_mooncake)
