"""TraceLab agent sessions: CSV with a session's rounds, kept prefix, new tokens and tool waits."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from backbench.errors import shown
from backbench.workloads.readers.format import has_columns, trace_format
from backbench.workloads.readers.text import BadRows, read_csv
from backbench.workloads.trace import Follow, TraceRow

COLUMNS = ("round_idx", "prefix_len", "input_len", "output_len", "tool_wait_after_ms")
_MS = 1_000_000


@dataclass(frozen=True)
class _Round:
    index: int
    arrival_ns: int
    prefix_tokens: int
    input_tokens: int
    output_tokens: int
    wait_ns: int


def read_tracelab(path: Path, bad: BadRows | None = None) -> Iterator[TraceRow]:
    """Rounds of all sessions in order of time. Raises WorkloadError naming file, line and field.

    A round is sent its session's `tool_wait_after_ms` after the answer before it. Its prompt is the first
    `prefix_len` tokens of the session's context (the prompt and answer before it) and `input_len` new ones.
    `arrival_time` (ms, default 0) of a session's first round releases the session. Rounds of different
    sessions interleave, so the file is read whole.
    """
    sessions: dict[str, dict[int, _Round]] = {}
    bad = bad or BadRows()
    for place, row in read_csv(path, COLUMNS, bad):
        with bad.row():
            name = row.get("session_id", row.get("id", "")).strip()
            if not name:
                place.fail("session_id", "is missing.")
            found = _Round(
                index=place.whole("round_idx", row["round_idx"]),
                arrival_ns=place.seconds_ns("arrival_time", row.get("arrival_time", "0"), _MS),
                prefix_tokens=place.whole("prefix_len", row["prefix_len"]),
                input_tokens=place.whole("input_len", row["input_len"]),
                output_tokens=place.whole("output_len", row["output_len"], 1),
                wait_ns=place.seconds_ns("tool_wait_after_ms", row["tool_wait_after_ms"], _MS),
            )
            if found.prefix_tokens + found.input_tokens == 0:
                place.fail("input_len", "the prompt is empty.")
            if found.index in sessions.setdefault(name, {}):
                place.fail("round_idx", f"session {shown(name)} has round {found.index} twice.")
            sessions[name][found.index] = found
    rows = (_session_rows(name, rounds.values()) for name, rounds in sessions.items())
    yield from sorted(itertools.chain.from_iterable(rows), key=lambda row: row.arrival_ns)


def _session_rows(name: str, rounds: Iterable[_Round]) -> Iterator[TraceRow]:
    ordered = sorted(rounds, key=lambda item: item.index)
    arrival_ns = ordered[0].arrival_ns
    before: _Round | None = None
    for item in ordered:
        follow = None
        if before is not None:
            key = f"{name}/{before.index}"
            follow = Follow(key, before.wait_ns, key, item.prefix_tokens)
            arrival_ns += before.wait_ns
        yield TraceRow(
            # A prefix longer than the known context is content that the trace did not record: new, too.
            input_tokens=item.prefix_tokens + item.input_tokens,
            output_tokens=item.output_tokens,
            arrival_ns=arrival_ns,
            session=name,
            key=f"{name}/{item.index}",
            follow=follow,
        )
        before = item


FORMAT = trace_format("tracelab", has_columns(COLUMNS), read_tracelab)
