"""LMBenchmark: an array of text inputs with output lengths, or users' rounds of calls to agents, one a line.

    [{"input": "...", "output_length": 275}, ...]
    {"round1": {"0_input": "...", "0_max_tokens": 20, "1_input": ..., "1_max_tokens": ...}, "round2": ...}

Neither has times.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from backbench.workloads.draft import OFFER_OPTIONS, Draft, draft_trace
from backbench.workloads.options import WorkloadOptions
from backbench.workloads.readers.format import Format, Head
from backbench.workloads.readers.json_array import read_objects
from backbench.workloads.readers.prompts import text_ids
from backbench.workloads.readers.text import BadRows, Place
from backbench.workloads.readers.turns import Session
from backbench.workloads.trace import TraceRow

ROUND = re.compile(r"round([0-9]{1,9})")
CALL = re.compile(r"([0-9]{1,9})_(?:input|max_tokens)")
ROUNDS_NOTE = (
    "a call's prompt is its own input; the answers of agents before it, which are not recorded, are missing."
)


def read_lmbenchmark(path: Path, options: WorkloadOptions, bad: BadRows | None = None) -> Iterator[TraceRow]:
    """Rows in file order; a user is a session, whose calls stand round by round, agent by agent."""
    bad = bad or BadRows()
    for user, (place, entry) in enumerate(read_objects(path, bad)):
        with bad.row():
            rounds = sorted((int(found[1]), name) for name in entry if (found := ROUND.fullmatch(name)))
            if not rounds:
                yield _row(place, "", entry.get("input"), entry.get("output_length"), options)
                continue
            calls = [call for _, name in rounds for call in _calls(place, name, entry[name], options)]
            session = Session(str(user))
            yield from (session.turn(call, None, kept_tokens=0) for call in calls)


def _calls(place: Place, name: str, agents: Any, options: WorkloadOptions) -> Iterator[TraceRow]:
    if not isinstance(agents, dict):
        place.fail(name, "is no round of calls.")
    for agent in sorted({int(found[1]) for key in agents if (found := CALL.fullmatch(key))}):
        yield _row(
            place, f"{name}.", agents.get(f"{agent}_input"), agents.get(f"{agent}_max_tokens"), options
        )


def _row(place: Place, within: str, text: Any, output_tokens: Any, options: WorkloadOptions) -> TraceRow:
    prompt = text_ids(place, f"{within}input", text, options)
    name = f"{within}max_tokens" if within else "output_length"
    return TraceRow(len(prompt), place.whole(name, output_tokens, 1), prompt=prompt)


def draft_lmbenchmark(path: Path, options: WorkloadOptions) -> Draft:
    """The file as a workload. Raises WorkloadError naming file, line and field."""
    bad = BadRows(skip=options.bad_rows == "skip")
    rows = read_lmbenchmark(path, options, bad)
    source = {"kind": "lmbenchmark", "data": path.name}
    draft = draft_trace(path.name, rows, source, options, count=options.num_requests, timed=False, bad=bad)
    in_rounds = any(row.session is not None for row in draft.rows)
    return replace(draft, notes=(ROUNDS_NOTE,) * in_rounds, clip=False)


def _recognise(head: Head) -> int:
    if any(ROUND.fullmatch(name) for name in head.fields):
        return sum(1 for name in head.names if ROUND.fullmatch(name) or CALL.fullmatch(name))
    array = head.text.startswith("[") and "conversations" not in head.names
    return 2 if array and "input" in head.names else 0


OPTIONS = OFFER_OPTIONS | {"sample", "sessions", "bad_rows"}
FORMAT = Format("lmbenchmark", _recognise, OPTIONS, draft_lmbenchmark)
