"""LLMServingSim: JSONL of requests or of sessions, or its first versions' tab-separated table; in ns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from backbench.workloads.draft import SYNTHETIC_NOTE, TRACE_OPTIONS, Draft, draft_trace
from backbench.workloads.options import WorkloadOptions
from backbench.workloads.readers.format import Format, Head, read_head
from backbench.workloads.readers.text import BadRows, Place, read_csv, read_jsonl, whole_list
from backbench.workloads.readers.turns import Session
from backbench.workloads.trace import LATEST_NS, TraceRow

COLUMNS = ("input_toks", "output_toks", "arrival_time_ns")
FIELDS = frozenset(
    {*COLUMNS, "input_tok_ids", "output_tok_ids", "session_id", "sub_requests", "tool_duration_ns"}
)
FOREIGN = "token ids are those of another model, and taken modulo the vocabulary: what they share is kept."


def read_llmservingsim(path: Path, bad: BadRows | None = None) -> list[TraceRow]:
    """Rows in order of time; a session's calls wait for the tool between them. The file is read whole.

    Raises WorkloadError naming file, line and field.
    """
    bad = bad or BadRows()
    return sorted(_rows(path, bad), key=lambda row: row.arrival_ns)


def _rows(path: Path, bad: BadRows) -> Iterator[TraceRow]:
    if _is_table(read_head(path)):
        lines: Iterator[tuple[Place, Mapping[str, Any]]] = read_csv(path, COLUMNS, bad, delimiter="\t")
    else:
        lines = read_jsonl(path, ("arrival_time_ns",), bad)
    for place, row in lines:
        with bad.row():
            start_ns = place.whole("arrival_time_ns", row["arrival_time_ns"], 0, LATEST_NS - 1)
            if "sub_requests" not in row:
                yield replace(_call(place, row), arrival_ns=start_ns)
            else:
                yield from _session(place, row, start_ns)


def _session(place: Place, row: Mapping[str, Any], start_ns: int) -> list[TraceRow]:
    calls = row["sub_requests"]
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        place.fail("sub_requests", "is no list of calls.")
    session = Session(place.session(row.get("session_id", f"line {place.line}")))
    rows: list[TraceRow] = []
    wait_ns = 0
    for call in calls:
        first = start_ns if not rows else None
        made = _call(place, call)
        rows.append(session.turn(made, first, wait_ns, None if made.prompt is None else 0))
        wait_ns = place.whole("tool_duration_ns", call.get("tool_duration_ns", 0), 0, LATEST_NS - 1)
    return rows


def _call(place: Place, call: Mapping[str, Any]) -> TraceRow:
    for name in COLUMNS[:2]:
        if name not in call:
            place.fail(name, "is missing.")
    input_tokens = place.whole("input_toks", call["input_toks"], 1)
    ids = whole_list(place, "input_tok_ids", call["input_tok_ids"]) if call.get("input_tok_ids") else None
    if ids is not None and len(ids) != input_tokens:
        place.fail("input_tok_ids", f"{len(ids)} ids, but input_toks says {input_tokens}.")
    return TraceRow(input_tokens, place.whole("output_toks", call["output_toks"], 1), prompt=ids)


def draft_llmservingsim(path: Path, options: WorkloadOptions) -> Draft:
    """The file as a workload. Raises WorkloadError naming file, line and field."""
    bad = BadRows(skip=options.bad_rows == "skip")
    rows = read_llmservingsim(path, bad)
    source = {"kind": "llmservingsim", "data": path.name}
    draft = draft_trace(path.name, rows, source, options, count=options.num_requests, bad=bad)
    known = [_within(row, options.vocab_size) for row in draft.rows]
    foreign = any(row is not held for row, held in zip(known, draft.rows, strict=True))
    notes = (SYNTHETIC_NOTE,) * any(row.prompt is None for row in known) + (FOREIGN,) * foreign
    return replace(draft, rows=known, notes=notes)


def _within(row: TraceRow, vocab_size: int) -> TraceRow:
    if row.prompt is None or max(row.prompt) < vocab_size:
        return row
    return replace(row, prompt=tuple(token % vocab_size for token in row.prompt))


def _is_table(head: Head) -> bool:
    return {name.strip() for name in head.text.split("\t")}.issuperset(COLUMNS)


def _recognise(head: Head) -> int:
    if _is_table(head):
        return len(COLUMNS)
    return len(head.names & FIELDS) if "input_toks" in head.names else 0


FORMAT = Format("llmservingsim", _recognise, TRACE_OPTIONS | {"bad_rows"}, draft_llmservingsim)
