"""Qwen Bailian traces: JSONL with seconds, chat turns and ids of 16-token blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from backbench.workloads.readers.format import Head, trace_format
from backbench.workloads.readers.text import BadRows, Clock, read_jsonl, whole_list
from backbench.workloads.trace import TraceRow, follow_recorded

BLOCK_TOKENS = 16
FIELDS = ("chat_id", "parent_chat_id", "timestamp", "input_length", "output_length")


def read_qwen_bailian(path: Path, bad: BadRows | None = None) -> Iterator[TraceRow]:
    """Rows in file order; `session` is the chat's first turn. WorkloadError names file, line and field.

    A turn is sent at its time, or when its parent's answer ended where that is later. A last, partial block
    may have an id or not, and a row none at all; tokens without an id are the request's own.
    """
    bad = bad or BadRows()
    turns: dict[int, TraceRow] = {}
    clock = Clock("timestamp")
    for place, row in read_jsonl(path, FIELDS, bad):
        with bad.row():
            chat = place.whole("chat_id", row["chat_id"], 0, 2**63 - 1)
            parent = place.whole("parent_chat_id", row["parent_chat_id"], -1, 2**63 - 1)
            before = turns.get(parent)
            # A parent before the file's start is a first turn that was not recorded.
            first = str(chat if parent == -1 else parent)
            input_tokens = place.whole("input_length", row["input_length"], 1)
            block_ids = whole_list(place, "hash_ids", row.get("hash_ids", []))
            fewest, most = input_tokens // BLOCK_TOKENS, -(-input_tokens // BLOCK_TOKENS)
            if "hash_ids" in row and not fewest <= len(block_ids) <= most:
                problem = f"{len(block_ids)} ids do not fit {input_tokens} tokens in blocks of 16."
                place.fail("hash_ids", problem)
            found = TraceRow(
                input_tokens=input_tokens,
                output_tokens=place.whole("output_length", row["output_length"], 1),
                arrival_ns=clock.check(place, place.seconds_ns("timestamp", row["timestamp"])),
                block_ids=block_ids,
                block_tokens=BLOCK_TOKENS,
                session=first if before is None else before.session,
                key=str(chat),
            )
            if before is not None:
                found = replace(found, follow=follow_recorded(before, found, None))
            turns[chat] = found
            yield found


def _recognise(head: Head) -> int:
    return len(head.fields & {*FIELDS, "hash_ids"}) if "chat_id" in head.fields else 0


FORMAT = trace_format("qwen-bailian", _recognise, read_qwen_bailian)
