"""A user's own log: JSONL of OpenAI chat or completion request bodies, optionally with a `timestamp`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from backbench.errors import WorkloadError, shown
from backbench.workloads.draft import MAXIMUM_FILE_REQUESTS, OFFER_OPTIONS, Draft, cut
from backbench.workloads.options import WorkloadOptions, choose_offer
from backbench.workloads.readers.format import Format, Head
from backbench.workloads.readers.text import Clock, Place, read_jsonl, whole_list
from backbench.workloads.trace import TraceRow

FIELDS = ("model", "messages", "prompt", "max_tokens", "max_completion_tokens", "temperature", "timestamp")


def read_openai(path: Path, tokenize: Callable[[str], list[int]] | None) -> Iterator[tuple[TraceRow, bool]]:
    """(row, has a timestamp) in file order; the first time is 0, times in seconds.

    `prompt` may be token ids; text needs `tokenize`. Messages are joined as "role: content" lines, as no chat
    template is known here. The output length is `max_completion_tokens` or `max_tokens`.
    """
    start_ns: int | None = None
    clock = Clock("timestamp")
    for place, body in read_jsonl(path, ()):
        prompt = _prompt(place, body, tokenize)
        if not prompt:
            place.fail("prompt", "is empty.")
        limit = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
        arrival_ns = 0
        if "timestamp" in body:
            absolute_ns = place.seconds_ns("timestamp", body["timestamp"])
            start_ns = absolute_ns if start_ns is None else start_ns
            arrival_ns = clock.check(place, absolute_ns - start_ns)
        row = TraceRow(
            input_tokens=len(prompt),
            output_tokens=place.whole(limit, body.get(limit), 1),
            arrival_ns=arrival_ns,
            prompt=prompt,
            temperature=_temperature(place, body),
        )
        yield row, "timestamp" in body


def _prompt(
    place: Place, body: dict[str, Any], tokenize: Callable[[str], list[int]] | None
) -> tuple[int, ...]:
    prompt = body.get("prompt")
    if isinstance(prompt, list):
        return whole_list(place, "prompt", prompt)
    field = "messages" if "messages" in body else "prompt"
    text = _messages(place, body["messages"]) if field == "messages" else prompt
    if not isinstance(text, str):
        place.fail(field, "give `messages`, or a `prompt` of text or token ids.")
    if tokenize is None:
        place.fail(field, "text needs a tokenizer; choose a model that has one.")
    place.require_encodable(field, text)
    return tuple(tokenize(text))


def _messages(place: Place, messages: object) -> str:
    if not isinstance(messages, list) or not messages:
        place.fail("messages", "is no list of messages.")
    lines = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            place.fail("messages.content", "missing, or not a string.")
        lines.append(f"{message.get('role', 'user')}: {message['content']}")
    return "\n".join(lines)


def _temperature(place: Place, body: dict[str, Any]) -> float | None:
    value = body.get("temperature")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 100:
        place.fail("temperature", f"{shown(value)} is no number between 0 and 100.")
    return float(value)


def draft_openai(path: Path, options: WorkloadOptions) -> Draft:
    """The bodies in file order, at their timestamps where all have one."""
    found = read_openai(path, options.tokenize)
    wanted = MAXIMUM_FILE_REQUESTS + 1 if options.num_requests is None else options.num_requests
    pairs = list(itertools.islice(found, wanted))
    timed = [has_time for _, has_time in pairs]
    if any(timed) and not all(timed):
        raise WorkloadError(f"'{path}' has a timestamp on some requests only; give all or none of them one.")
    rows = cut(path.name, (row for row, _ in pairs), options.num_requests)
    offer = choose_offer(options, has_times=all(timed))
    return Draft(path.name, rows, offer, {"kind": "openai", "data": path.name})


def _recognise(head: Head) -> int:
    return len(head.fields & set(FIELDS)) if head.fields & {"messages", "prompt"} else 0


FORMAT = Format("openai", _recognise, OFFER_OPTIONS | {"time_scale"}, draft_openai)
