"""AIPerf's own files: generated agentic days (dataset.jsonl), single turns, conversations, traces with text.

A trace line's `input_length` counts what a turn adds to its session, not the whole prompt, so a prompt is
the session so far (answers included) and the new blocks. Times and delays are milliseconds.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from backbench.errors import WorkloadError, shown
from backbench.workloads.draft import SYNTHETIC_NOTE, TRACE_OPTIONS, Draft, draft_trace
from backbench.workloads.options import WorkloadOptions
from backbench.workloads.readers import openai
from backbench.workloads.readers.format import Format, Head
from backbench.workloads.readers.prompts import Messages, chat_ids, output_or_drawn, read_messages, text_ids
from backbench.workloads.readers.text import BadRows, Place, read_jsonl, whole_list
from backbench.workloads.readers.turns import Session, block_segments, block_size
from backbench.workloads.trace import Segment, TraceRow

MARKS = frozenset(
    {"group_id", "is_restart", "message_mode", "payload", "text", "text_input", "texts", "turns"}
)
"""Fields that no other format's lines have."""
FIELDS = frozenset(
    {"delay", "hash_ids", "input_length", "messages", "output_length", "session_id", "timestamp"}
)
_MS = 1_000_000


class _Reader:
    """Lines to rows; sessions may interleave."""

    def __init__(self, options: WorkloadOptions, block_tokens: int) -> None:
        self.options = options
        self.block_tokens = block_tokens
        self.rows: list[TraceRow] = []
        self.sessions: dict[str, Session] = {}
        self.starts = [0, 0]
        """Sessions that say when they start, and sessions in all; a request alone is one."""
        self.lengths = self.templated = False

    def add(self, place: Place, entry: dict[str, Any]) -> None:
        turns = entry.get("turns", [entry])
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
            place.fail("turns", "is no list of turns.")
        name = place.session(entry.get("session_id"))
        if name is None and "turns" in entry:
            name = f"line {place.line}"
        fresh = Session(name)
        session = fresh if name is None else self.sessions.setdefault(name, fresh)
        made: list[TraceRow] = []
        before: Messages = []
        for turn in turns:
            if turn.get("role") == "system" and not session.turns:
                before.append(("system", self._text(place, turn)))
            else:
                made.append(self._turn(place, turn, session, [] if made else before, "turns" in entry))
        self.rows += made

    def _turn(
        self, place: Place, turn: dict[str, Any], session: Session, before: Messages, grows: bool
    ) -> TraceRow:
        when, wait = turn.get("timestamp"), turn.get("delay")
        start_ns = None if when is None else place.seconds_ns("timestamp", when, _MS)
        wait_ns = 0 if wait is None else place.seconds_ns("delay", wait, _MS)
        output_tokens = self._output_tokens(place, turn)
        if "input_length" in turn:
            row, kept = self._of_length(place, turn, session, output_tokens), session.context_tokens
        else:
            prompt, grows = self._prompt(place, turn, session, before, grows)
            kept = session.context_tokens if grows else 0
            row = TraceRow(kept + len(prompt), output_tokens, prompt=prompt)
        if session.turns == 0:
            self.starts = [self.starts[0] + (start_ns is not None), self.starts[1] + 1]
        return session.turn(row, start_ns, wait_ns, kept)

    def _of_length(
        self, place: Place, turn: dict[str, Any], session: Session, output_tokens: int
    ) -> TraceRow:
        self.lengths = True
        added = place.whole("input_length", turn["input_length"], 1)
        ids = whole_list(place, "hash_ids", turn.get("hash_ids", []))
        blocks = -(-added // self.block_tokens)
        if ids and len(ids) != blocks:
            problem = f"{len(ids)} ids, but {added} tokens are {blocks} blocks of {self.block_tokens}."
            place.fail("hash_ids", problem)
        if session.name is None:
            return TraceRow(added, output_tokens, block_ids=ids, block_tokens=self.block_tokens)
        own = f"session/{session.name}/{session.turns}/input"
        new = block_segments(ids, self.block_tokens, added) if ids else (Segment(own, 0, added),)
        prompt = session.grown(new, output_tokens)
        return TraceRow(sum(part.tokens for part in prompt), output_tokens, segments=prompt)

    def _prompt(
        self, place: Place, turn: dict[str, Any], session: Session, before: Messages, grows: bool
    ) -> tuple[tuple[int, ...], bool]:
        """Token ids, and whether they only add to what was said in the session."""
        body = turn.get("payload", turn)
        if not isinstance(body, dict):
            place.fail("payload", "is no request body.")
        if "prompt" in body and "messages" not in body:
            return text_ids(place, "prompt", body["prompt"], self.options), False
        if "messages" in body:
            messages = read_messages(place, "messages", body["messages"])
            grows = turn.get("message_mode") == "delta"
        else:
            messages = [(str(turn.get("role") or "user"), self._text(place, turn))]
            grows |= "text_input" in turn
        field = "messages" if "messages" in body else "text"
        if grows and session.turns:
            # The template would begin another conversation.
            added = "\n".join(content for _, content in messages)
            return text_ids(place, field, added, self.options), True
        ids, templated = chat_ids(place, field, before + messages, self.options)
        self.templated |= templated
        return ids, False

    def _text(self, place: Place, turn: dict[str, Any]) -> str:
        texts = turn.get("texts", [turn.get("text_input", turn.get("text"))])
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            place.fail(
                "text", "give text, an `input_length`, `messages` or a `payload`; only text is replayed."
            )
        return "".join(texts)

    def _output_tokens(self, place: Place, turn: dict[str, Any]) -> int:
        recorded = turn.get("output_length")
        body = turn.get("payload")
        if recorded is None and isinstance(body, dict):
            recorded = body.get("max_completion_tokens", body.get("max_tokens"))
        return output_or_drawn(place, "output_length", recorded, self.options, len(self.rows), "missing")


def draft_aiperf(path: Path, options: WorkloadOptions) -> Draft:
    """The file as a workload; it is read whole. Raises WorkloadError naming file, line and field."""
    bad = BadRows(skip=options.bad_rows == "skip")
    lines = list(read_jsonl(path, (), bad))
    sizes = ((row.get("input_length"), row.get("hash_ids")) for _, row in lines)
    size = block_size(
        path, ((n, len(ids)) for n, ids in sizes if isinstance(n, int) and isinstance(ids, list))
    )
    reader = _Reader(options, size)
    for place, entry in lines:
        with bad.row():
            reader.add(place, entry)
    timed, all_of_them = reader.starts
    if timed not in (0, all_of_them):
        raise WorkloadError(
            f"{shown(str(path), 150)} has a timestamp on some first turns only; give all or none of them one."
        )
    source = {"kind": "aiperf", "data": path.name, "block_tokens": size, "chat_template": reader.templated}
    rows = sorted(reader.rows, key=lambda row: row.arrival_ns)
    draft = draft_trace(
        path.name,
        rows,
        source,
        options,
        count=options.num_requests,
        timed=timed > 0,
        bad=bad,
    )
    return replace(draft, notes=(SYNTHETIC_NOTE,) * reader.lengths, clip=reader.lengths)


def _recognise(head: Head) -> int:
    logged = {"messages", "output_length"} <= head.fields
    if not (head.fields & MARKS or logged):
        return 0
    return len(head.names & {*MARKS, *FIELDS, *openai.FIELDS, *openai.BODIES})


FORMAT = Format("aiperf", _recognise, TRACE_OPTIONS | {"bad_rows", "output_lengths"}, draft_aiperf)
