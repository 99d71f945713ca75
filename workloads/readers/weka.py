"""Agentic sessions as Weka publishes them: one JSON object a session, with its subagents' requests inside.

    {"id": "...", "block_size": 64, "hash_id_scope": "local", "tool_tokens": 0, "system_tokens": 0,
     "requests": [{"t": 0.0, "type": "n", "in": 128679, "out": 838, "hash_ids": [...], "api_time": 19.6,
                   "think_time": 0.0}, {"t": 20.1, "type": "subagent", "requests": [...]}, ...]}

A file holds one session, an array of them, or one a line. Times are seconds since the session's start.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from backbench.workloads.readers.format import Head, trace_format
from backbench.workloads.readers.json_array import read_objects
from backbench.workloads.readers.text import (
    UNREADABLE,
    BadRows,
    Place,
    json_problem,
    open_text,
    read_lines,
    whole_list,
)
from backbench.workloads.trace import Segment, TraceRow, follow_recorded

FIELDS = frozenset({"block_size", "hash_id_scope", "tool_tokens", "system_tokens", "requests"})
NOTE = (
    "sessions have no times of their own; requests that did not stream are replayed like those that did; "
    "tools and system prompts of equal length are taken to be the same in all sessions."
)
LARGEST_BLOCK = 65_536
DEEPEST = 20
"""Subagents within subagents."""


def read_weka(path: Path, bad: BadRows | None = None) -> Iterator[TraceRow]:
    """Turns in file order, session by session, each by time. WorkloadError names file, line and field.

    A turn follows the one before it in its own stream, and the subagents that had ended before it began: it
    is sent its think time after the last of them. Where no `think_time` is given it is what the times leave:
    `t` less the end of what it follows (its `t` and `api_time`). A subagent's first turn follows the turn
    that stands before the subagent.
    """
    bad = bad or BadRows()
    for number, (place, entry) in enumerate(_entries(path, bad)):
        with bad.row():
            yield from _Session(place, entry, number).rows()


def _entries(path: Path, bad: BadRows) -> Iterator[tuple[Place, dict[str, Any]]]:
    """The sessions; of a file that is one object written over many lines, that one."""
    if not _spread_out(path):
        yield from read_objects(path, bad)
        return
    place = Place(path, 1)
    bad.rows += 1
    with bad.row():
        try:
            with open_text(path) as file:
                entry = json.load(file)
        except UNREADABLE as error:
            place.fail("(the whole file)", f"unreadable: {error}")
        except (ValueError, RecursionError) as error:
            place.fail("(the whole file)", json_problem(error))
        if not isinstance(entry, dict):
            place.fail("(the whole file)", "is no JSON object.")
        yield place, entry


def _spread_out(path: Path) -> bool:
    first = next((line.strip() for _, line in read_lines(path) if line.strip()), "")
    return first == "{"


@dataclass(frozen=True)
class _Ended:
    """A turn and when it ended."""

    row: TraceRow
    end_ns: int


@dataclass
class _Session:
    place: Place
    entry: dict[str, Any]
    number: int
    """Of the session in the file: ids are local to it."""
    found: list[TraceRow] = field(default_factory=list)

    def rows(self) -> list[TraceRow]:
        place, entry = self.place, self.entry
        self.name = str(entry.get("id", self.number))
        place.require_encodable("id", self.name)
        self.block_tokens = place.whole("block_size", entry.get("block_size", 64), 1, LARGEST_BLOCK)
        self.local = entry.get("hash_id_scope", "local") == "local"
        self._stream(entry, None, 0)
        # By time; Python's sort keeps the order of turns that begin together.
        return sorted(self.found, key=lambda row: row.arrival_ns)

    def _stream(self, entry: dict[str, Any], before: _Ended | None, depth: int) -> _Ended | None:
        """Add the turns of a session or subagent that begins after `before`; returns the last one."""
        place = self.place
        requests = entry.get("requests")
        if not isinstance(requests, list):
            place.fail("requests", "missing, or not a list of requests.")
        if depth > DEEPEST:
            place.fail("requests", f"has subagents more than {DEEPEST} deep.")
        head = self._shared_head(entry)
        last: _Ended | None = None
        subagents: list[_Ended] = []
        for request in requests:
            if not isinstance(request, dict):
                place.fail("requests", "an entry is no JSON object.")
            if request.get("type") == "subagent":
                ended = self._stream(request, last or before, depth + 1)
                subagents += [ended] if ended is not None else []
                continue
            last = self._turn(request, head, last or before, subagents)
        return last

    def _shared_head(self, entry: dict[str, Any]) -> tuple[Segment, ...]:
        tools = self.place.whole("tool_tokens", entry.get("tool_tokens") or 0)
        system = self.place.whole("system_tokens", entry.get("system_tokens") or 0)
        return (Segment(f"agent/{tools}/{system}", 0, tools + system),) if tools + system else ()

    def _turn(
        self,
        request: dict[str, Any],
        head: tuple[Segment, ...],
        before: _Ended | None,
        subagents: list[_Ended],
    ) -> _Ended:
        place = self.place
        start_ns = place.seconds_ns("requests.t", request.get("t"))
        took_ns = place.seconds_ns("requests.api_time", request.get("api_time") or 0)
        input_tokens = place.whole("requests.in", request.get("in"), 1)
        row = TraceRow(
            input_tokens=input_tokens,
            output_tokens=place.whole("requests.out", request.get("out"), 1),
            arrival_ns=start_ns,
            block_ids=self._block_ids(request, input_tokens),
            block_tokens=self.block_tokens,
            segments=head,
            session=self.name,
            key=f"{self.number}/{len(self.found)}",
        )
        if before is not None:
            row = self._following(row, request, before, subagents)
        self.found.append(row)
        return _Ended(row, row.arrival_ns + took_ns)

    def _following(
        self, row: TraceRow, request: dict[str, Any], before: _Ended, subagents: list[_Ended]
    ) -> TraceRow:
        """The turn after `before` and the subagents that had ended meanwhile: the last one decides when."""
        joined = [each for each in subagents if before.end_ns < each.end_ns <= row.arrival_ns]
        awaited = max(joined, key=lambda each: each.end_ns, default=before)
        think_ns = max(0, row.arrival_ns - awaited.end_ns)
        if awaited is before and request.get("think_time") is not None:
            think_ns = self.place.seconds_ns("requests.think_time", request["think_time"])
        follow = follow_recorded(before.row, row, think_ns)
        assert awaited.row.key is not None
        # Recorded clocks may overlap; a turn never stands before what it waits for.
        arrival_ns = max(row.arrival_ns, awaited.row.arrival_ns, before.row.arrival_ns)
        return replace(row, arrival_ns=arrival_ns, follow=replace(follow, row=awaited.row.key))

    def _block_ids(self, request: dict[str, Any], input_tokens: int) -> tuple[int, ...]:
        ids = whole_list(self.place, "requests.hash_ids", request.get("hash_ids") or [])
        if len(ids) > -(-input_tokens // self.block_tokens):
            problem = f"{len(ids)} ids, but {input_tokens} tokens are fewer blocks of {self.block_tokens}."
            self.place.fail("requests.hash_ids", problem)
        return tuple(self._global(each) for each in ids) if self.local else ids

    def _global(self, block_id: int) -> int:
        """An id that no other session has: local ones count from 1 in each."""
        text = f"weka/{self.number}/{block_id}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def _recognise(head: Head) -> int:
    known = len(head.names & FIELDS)
    return known if "requests" in head.names and known >= 2 else 0


FORMAT = trace_format("weka", _recognise, read_weka, timed=lambda head: False, notes=(NOTE,))
