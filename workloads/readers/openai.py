"""A user's own log of OpenAI requests: bodies as they were sent, alone or beside the answer.

One JSON object a line, or one array of them. The length that is replayed is the answer's real one, where the
log has it (`usage`, or the answer's text); otherwise the cap that the request set.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from backbench.errors import WorkloadError, shown
from backbench.workloads.draft import (
    MAXIMUM_FILE_REQUESTS,
    OFFER_OPTIONS,
    TIME_OPTIONS,
    Draft,
    cut,
    settle_times,
)
from backbench.workloads.options import WorkloadOptions, choose_offer
from backbench.workloads.readers.format import Format, Head
from backbench.workloads.readers.json_array import read_objects
from backbench.workloads.readers.prompts import chat_ids, output_or_drawn, read_messages, text_ids
from backbench.workloads.readers.text import BadRows, Clock, Place
from backbench.workloads.trace import TraceRow

FIELDS = ("model", "messages", "prompt", "max_tokens", "max_completion_tokens", "temperature", "timestamp")
BODIES = ("body", "request")
"""Where a log keeps what was sent, if beside other things; `body` is the Batch API's."""
UNITS_NS = ((1e17, 1), (1e14, 1_000), (1e11, 1_000_000), (0.0, 1_000_000_000))
"""A time of at least so much is in units of so many ns: since 1973, s, ms, us and ns do not overlap."""
WITHOUT_EFFECT = {
    "n": 1,
    "best_of": 1,
    "top_p": 1,
    "stop": None,
    "presence_penalty": 0,
    "frequency_penalty": 0,
}
"""What a request may ask for and a replay does not do -> what asks for nothing."""


@dataclass
class Log:
    """What is known of a log besides its rows, once they were read."""

    timed: int = 0
    rows: int = 0
    templated: bool = False
    """The model's chat template was applied."""
    ignored: Counter[str] | None = None
    """Field without effect -> requests that set it."""


def read_openai(path: Path, options: WorkloadOptions, bad: BadRows, log: Log) -> Iterator[TraceRow]:
    """Rows in file order; the first time is 0. Counts into `log`. WorkloadError names file, line and field.

    `prompt` may be token ids; text needs a tokenizer. Messages become a prompt by the model's chat template,
    or "role: content" lines where it has none.
    """
    start_ns: int | None = None
    clock = Clock("timestamp")
    log.ignored = Counter()
    for place, entry in read_objects(path, bad):
        with bad.row():
            body = next((entry[name] for name in BODIES if isinstance(entry.get(name), dict)), entry)
            prompt = _prompt(place, body, options, log)
            absolute_ns = _time_ns(place, entry, body)
            start_ns = absolute_ns if start_ns is None else start_ns
            row = TraceRow(
                input_tokens=len(prompt),
                output_tokens=_output_tokens(place, entry, body, options, log.rows),
                arrival_ns=0 if absolute_ns is None else clock.check(place, absolute_ns - (start_ns or 0)),
                prompt=prompt,
                temperature=_temperature(place, body),
                seed=None if body.get("seed") is None else place.whole("seed", body["seed"], 0, 2**63 - 1),
            )
            log.rows += 1
            log.timed += absolute_ns is not None
            log.ignored.update(
                name for name, nothing in WITHOUT_EFFECT.items() if body.get(name) not in (None, nothing)
            )
            yield row


def _prompt(place: Place, body: dict[str, Any], options: WorkloadOptions, log: Log) -> tuple[int, ...]:
    if isinstance(body.get("prompt"), list) or "messages" not in body:
        return text_ids(place, "prompt", body.get("prompt"), options)
    messages = read_messages(place, "messages", body["messages"])
    ids, templated = chat_ids(place, "messages", messages, options)
    log.templated |= templated
    return ids


def _output_tokens(
    place: Place, entry: dict[str, Any], body: dict[str, Any], options: WorkloadOptions, index: int
) -> int:
    """The answer's length, if the log has the answer; else the request's cap; else drawn as asked."""
    answer = entry.get("response")
    if isinstance(answer, dict) and isinstance(answer.get("body"), dict):
        answer = answer["body"]
    for holder in (answer, entry):
        usage = holder.get("usage") if isinstance(holder, dict) else None
        if isinstance(usage, dict) and usage.get("completion_tokens") is not None:
            return place.whole("usage.completion_tokens", usage["completion_tokens"], 1)
    text = _answer_text(answer)
    if text and options.tokenize is not None:
        place.require_encodable("response", text)
        return len(options.tokenize(text))
    names = ("max_completion_tokens", "max_tokens")
    cap = next((name for name in names if body.get(name) is not None), "max_tokens")
    reason = "missing, as are `usage` and `response`"
    return output_or_drawn(place, cap, body.get(cap), options, index, reason)


def _answer_text(answer: object) -> str | None:
    if isinstance(answer, str):
        return answer
    choices = answer.get("choices") if isinstance(answer, dict) else None
    first = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(first, dict):
        return None
    message = first.get("message")
    text = message.get("content") if isinstance(message, dict) else first.get("text")
    return text if isinstance(text, str) else None


def _time_ns(place: Place, entry: dict[str, Any], body: dict[str, Any]) -> int | None:
    """Since 1970 or the log's start: a number of seconds, ms, us or ns, by its size, or an ISO 8601 text."""
    value = entry.get("timestamp", body.get("timestamp"))
    if value is None:
        return None
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value.strip())
        except ValueError:
            place.fail(
                "timestamp", f"{shown(value)} is neither a number nor a time like 2026-01-02T03:04:05Z."
            )
        since = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - datetime(1970, 1, 1, tzinfo=UTC)
        if since.days < 0:
            place.fail("timestamp", f"{shown(value)} lies before 1970.")
        return (since.days * 86_400 + since.seconds) * 1_000_000_000 + since.microseconds * 1_000
    number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else 0
    unit_ns = next(unit for least, unit in UNITS_NS if number >= least or least == 0.0)
    return place.seconds_ns("timestamp", value, unit_ns)


def _temperature(place: Place, body: dict[str, Any]) -> float | None:
    value = body.get("temperature")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 100:
        place.fail("temperature", f"{shown(value)} is no number between 0 and 100.")
    return float(value)


def draft_openai(path: Path, options: WorkloadOptions) -> Draft:
    """The requests in file order, at their times where all have one."""
    bad, log = BadRows(skip=options.bad_rows == "skip"), Log()
    found = read_openai(path, options, bad, log)
    wanted = MAXIMUM_FILE_REQUESTS + 1 if options.num_requests is None else options.num_requests
    rows = cut(path.name, itertools.islice(found, wanted), options.num_requests, bad)
    if log.timed not in (0, log.rows):
        raise WorkloadError(f"'{path}' has a timestamp on some requests only; give all or none of them one.")
    offer = choose_offer(options, has_times=log.timed > 0)
    records: list[dict[str, Any]] = []
    if log.timed:
        rows, records = settle_times(rows, options)
    elif options.max_gap_s is not None:
        raise WorkloadError(f"'{path}' has no timestamps, so --max-gap does not apply.")
    source = {"kind": "openai", "data": path.name, "chat_template": log.templated, **bad.record()}
    notes: tuple[str, ...] = ()
    if log.ignored:
        asked = ", ".join(f"{name} ({count})" for name, count in log.ignored.most_common())
        notes = (f"one answer of the recorded length is replayed; asked for and ignored: {asked}.",)
    return Draft(path.name, rows, offer, source, records, notes)


def _recognise(head: Head) -> int:
    if "conversations" in head.names:
        return 0
    return len(head.names & {*FIELDS, *BODIES}) if head.names & {"messages", "prompt"} else 0


FORMAT = Format(
    "openai", _recognise, OFFER_OPTIONS | TIME_OPTIONS | {"bad_rows", "output_lengths"}, draft_openai
)
