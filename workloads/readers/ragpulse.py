"""RAGPulse: JSONL in seconds; prompts are made of system prompt, passages, history, web search and input.

`hash_ids` names the parts of a prompt; how long a part is stands in the files beside the trace
(1_sys_prompt.jsonl to 5_web_search.jsonl). Without them prompts have their lengths, and share nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from backbench.errors import shown
from backbench.workloads.draft import TRACE_OPTIONS, Draft, draft_trace
from backbench.workloads.options import WorkloadOptions
from backbench.workloads.readers.format import Format, Head
from backbench.workloads.readers.text import BadRows, Clock, Place, is_file, read_jsonl, whole_list
from backbench.workloads.readers.turns import Session
from backbench.workloads.trace import Segment, TraceRow

PARTS = {
    "sys_prompt": ("1_sys_prompt.jsonl", "sys_prompt_id"),
    "passages_ids": ("2_passages.jsonl", "passage_id"),
    "history": ("3_history.jsonl", "history_id"),
    "web_search": ("5_web_search.jsonl", "web_search_id"),
    "user_input": ("4_user_input.jsonl", "user_input_id"),
}
"""Part of a prompt, in the order they stand there -> the file with its lengths, and the ids' name in it."""
FIELDS = ("timestamp", "input_length", "output_length", "hash_ids")
ALONE = "the files with the parts' lengths are not beside the trace: prompts share nothing."


def read_ragpulse(path: Path, lengths: Mapping[int, int], bad: BadRows | None = None) -> Iterator[TraceRow]:
    """Rows in file order; a turn comes at its time, but not before the answer to the turn before it.

    `lengths`: tokens of each id; of an id without, the tokens are the request's own.

    Raises WorkloadError naming file, line and field.
    """
    bad = bad or BadRows()
    sessions: dict[str, Session] = {}
    clock = Clock("timestamp")
    for place, row in read_jsonl(path, FIELDS, bad):
        with bad.row():
            input_tokens = place.whole("input_length", row["input_length"], 1)
            asked = TraceRow(
                input_tokens=input_tokens,
                output_tokens=place.whole("output_length", row["output_length"], 1),
                segments=_segments(_ids(place, row["hash_ids"]), lengths, input_tokens),
            )
            name = place.session(row.get("session_id"))
            arrival_ns = clock.check(place, place.seconds_ns("timestamp", row["timestamp"]))
            session = Session(None) if name is None else sessions.setdefault(name, Session(name))
            yield session.turn(asked, arrival_ns, kept_tokens=0)


def _ids(place: Place, parts: Any) -> list[int]:
    if not isinstance(parts, dict):
        place.fail("hash_ids", f"{shown(parts)} is no object of parts and ids.")
    return [each for name in PARTS for each in whole_list(place, f"hash_ids.{name}", parts.get(name, []))]


def _segments(ids: list[int], lengths: Mapping[int, int], tokens: int) -> tuple[Segment, ...]:
    """What is known of the prompt's beginning, up to the first part of unknown length."""
    segments: list[Segment] = []
    for each in ids:
        if each not in lengths or not tokens:
            break
        length = min(lengths[each], tokens)
        segments.append(Segment("ragpulse", each, length))
        tokens -= length
    return tuple(segments)


def read_lengths(folder: Path) -> dict[int, int]:
    """Tokens of every id, from the files in `folder`; those that are not there are left out."""
    lengths: dict[int, int] = {}
    for name, field in PARTS.values():
        if is_file(folder / name):
            for place, row in read_jsonl(folder / name, (field, "token_length")):
                each = place.whole(field, row[field], 0, 2**64 - 1)
                lengths[each] = place.whole("token_length", row["token_length"])
    return lengths


def draft_ragpulse(path: Path, options: WorkloadOptions) -> Draft:
    """The file as a workload. Raises WorkloadError naming file, line and field."""
    bad = BadRows(skip=options.bad_rows == "skip")
    lengths = read_lengths(path.parent)
    source = {"kind": "ragpulse", "data": path.name, "parts": len(lengths)}
    rows = read_ragpulse(path, lengths, bad)
    notes = () if lengths else (ALONE,)
    return draft_trace(path.name, rows, source, options, count=options.num_requests, notes=notes, bad=bad)


def _recognise(head: Head) -> int:
    return len(head.names & {*FIELDS, *PARTS}) if head.names & {"sys_prompt", "passages_ids"} else 0


FORMAT = Format("ragpulse", _recognise, TRACE_OPTIONS | {"bad_rows"}, draft_ragpulse)
