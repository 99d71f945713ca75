"""Mooncake traces: JSONL with millisecond times on 3 s ticks and ids of 512-token blocks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from backbench.workloads.readers.format import Head, trace_format
from backbench.workloads.readers.text import Clock, read_jsonl, whole_list
from backbench.workloads.trace import TraceRow

BLOCK_TOKENS = 512
TICK_NS = 3_000_000_000
FIELDS = ("timestamp", "input_length", "output_length", "hash_ids")


def read_mooncake(path: Path) -> Iterator[TraceRow]:
    """Rows in file order, times as recorded (on the ticks). Raises WorkloadError naming file, line, field."""
    clock = Clock("timestamp")
    for place, row in read_jsonl(path, FIELDS):
        input_tokens = place.whole("input_length", row["input_length"], 1)
        block_ids = whole_list(place, "hash_ids", row["hash_ids"])
        blocks = -(-input_tokens // BLOCK_TOKENS)
        if len(block_ids) != blocks:
            place.fail(
                "hash_ids", f"{len(block_ids)} ids, but {input_tokens} tokens are {blocks} blocks of 512."
            )
        yield TraceRow(
            input_tokens=input_tokens,
            output_tokens=place.whole("output_length", row["output_length"], 1),
            arrival_ns=clock.check(place, place.seconds_ns("timestamp", row["timestamp"], 1_000_000)),
            block_ids=block_ids,
            block_tokens=BLOCK_TOKENS,
        )


def _recognise(head: Head) -> int:
    known = head.fields & set(FIELDS)
    return len(known) if "hash_ids" in known or len(known) == 3 else 0


FORMAT = trace_format("mooncake", _recognise, read_mooncake, tick_ns=TICK_NS)
