"""AIBrix workloads: JSONL of moments in ms, each with the requests that are sent then."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from backbench.workloads.draft import SYNTHETIC_NOTE, TRACE_OPTIONS, Draft, draft_trace
from backbench.workloads.options import WorkloadOptions
from backbench.workloads.readers.format import Format, Head
from backbench.workloads.readers.json_array import read_objects
from backbench.workloads.readers.prompts import chat_ids, output_or_drawn, read_messages, text_ids
from backbench.workloads.readers.text import BadRows, Clock, Place
from backbench.workloads.readers.turns import Session
from backbench.workloads.trace import TraceRow

FIELDS = frozenset({"timestamp", "requests", "prompt", "prompt_length", "output_length", "session_id"})
OLDER = {"prompt_length": "Prompt Length", "output_length": "Output Length"}
"""Names of today -> those of the generator's first files."""
_MS = 1_000_000


def read_aibrix(path: Path, options: WorkloadOptions, bad: BadRows | None = None) -> Iterator[TraceRow]:
    """Rows in file order. Raises WorkloadError naming file, line and field.

    A prompt is its text where there is a tokenizer; otherwise it has the length that the file states, and
    tokens of its own. A moment of which one request is wrong is wrong as a whole. A request of a session
    comes at its time, but not before the answer to the one before it.
    """
    bad = bad or BadRows()
    sessions: dict[str, Session] = {}
    clock = Clock("timestamp")
    count = 0
    for place, moment in read_objects(path, bad):
        with bad.row():
            for name in ("timestamp", "requests"):
                if name not in moment:
                    place.fail(name, "is missing.")
            if not isinstance(moment["requests"], list):
                place.fail("requests", "is no list of requests.")
            arrival_ns = clock.check(place, place.seconds_ns("timestamp", moment["timestamp"], _MS))
            rows = [_row(place, each, options, count + i) for i, each in enumerate(moment["requests"])]
            count += len(rows)
            for row in rows:
                session = Session(row.session)
                if row.session is not None:
                    session = sessions.setdefault(row.session, session)
                yield session.turn(row, arrival_ns, kept_tokens=0)


def _row(place: Place, request: Any, options: WorkloadOptions, index: int) -> TraceRow:
    if not isinstance(request, dict):
        place.fail("requests", "holds something that is no request.")
    recorded = {name: request.get(name, request.get(older)) for name, older in OLDER.items()}
    prompt: tuple[int, ...] | None = None
    said = request.get("prompt")
    if isinstance(said, list) and said and isinstance(said[0], dict):
        prompt, _ = chat_ids(place, "prompt", read_messages(place, "prompt", said), options)
    elif options.tokenize is not None or recorded["prompt_length"] is None:
        prompt = text_ids(place, "prompt", said, options)
    return TraceRow(
        input_tokens=place.whole("prompt_length", recorded["prompt_length"], 1)
        if prompt is None
        else len(prompt),
        output_tokens=output_or_drawn(
            place, "output_length", recorded["output_length"], options, index, "not recorded"
        ),
        prompt=prompt,
        session=place.session(request.get("session_id")),
    )


def draft_aibrix(path: Path, options: WorkloadOptions) -> Draft:
    """The file as a workload. Raises WorkloadError naming file, line and field."""
    bad = BadRows(skip=options.bad_rows == "skip")
    source = {"kind": "aibrix", "data": path.name}
    rows = read_aibrix(path, options, bad)
    draft = draft_trace(path.name, rows, source, options, count=options.num_requests, bad=bad)
    synthetic = any(row.prompt is None for row in draft.rows)
    return replace(draft, notes=(SYNTHETIC_NOTE,) * synthetic, clip=synthetic)


def _recognise(head: Head) -> int:
    return len(head.names & FIELDS) if {"timestamp", "requests"} <= head.names else 0


FORMAT = Format("aibrix", _recognise, TRACE_OPTIONS | {"bad_rows", "output_lengths"}, draft_aibrix)
