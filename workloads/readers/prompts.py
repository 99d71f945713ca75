"""What people wrote as prompts: text, messages or token ids, and lengths of answers that nobody recorded."""

from __future__ import annotations

import json
from typing import Any

from backbench.errors import shown
from backbench.workloads.lengths import parse_lengths
from backbench.workloads.options import WorkloadOptions
from backbench.workloads.readers.text import Place, whole_list
from backbench.workloads.streams import stream

Messages = list[tuple[str, str]]
"""Role and content of each."""


def text_ids(place: Place, field: str, text: object, options: WorkloadOptions) -> tuple[int, ...]:
    """A prompt of text or of token ids as ids, at least one; WorkloadError names file, line and field."""
    if isinstance(text, list):
        ids = whole_list(place, field, text)
    elif not isinstance(text, str):
        place.fail(field, "give `messages`, or a `prompt` of text or token ids.")
    elif options.tokenize is None:
        place.fail(field, "text needs a tokenizer; choose a model that has one.")
    else:
        place.require_encodable(field, text)
        ids = tuple(options.tokenize(text))
    if not ids:
        place.fail(field, "is empty.")
    return ids


def chat_ids(
    place: Place, field: str, messages: Messages, options: WorkloadOptions
) -> tuple[tuple[int, ...], bool]:
    """Messages as token ids, and whether the model's chat template made them.

    Where the model has none, they are lines of "role: content".
    """
    text = "\n".join(f"{role}: {content}" for role, content in messages)
    if options.tokenize is not None and options.tokenize_chat is not None:
        place.require_encodable(field, text)
        ids = options.tokenize_chat([{"role": role, "content": content} for role, content in messages])
        if ids is not None:
            if not ids:
                place.fail(field, "is empty.")
            return tuple(ids), True
    return text_ids(place, field, text, options), False


def read_messages(place: Place, field: str, messages: object) -> Messages:
    """Chat messages as an API takes them: content parts are joined, tool calls are text."""
    if not isinstance(messages, list) or not messages:
        place.fail(field, "is no list of messages.")
    found = []
    for message in messages:
        if not isinstance(message, dict):
            place.fail(field, f"{shown(message)} is no message.")
        calls = message.get("tool_calls")
        if message.get("content") is None and isinstance(calls, list) and calls:
            content = json.dumps(calls, ensure_ascii=False)
        else:
            content = _content(place, field, message.get("content"))
        found.append((str(message.get("role", "user")), content))
    return found


def _content(place: Place, field: str, content: object) -> str:
    """Text, or the text of content parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        place.fail(f"{field}.content", "missing, or neither text nor a list of parts.")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "input_text") or not isinstance(part.get("text"), str):
            place.fail(
                f"{field}.content", f"a part of type {shown(kind)} is no text, and only text is replayed."
            )
        texts.append(part["text"])
    return "".join(texts)


def output_or_drawn(
    place: Place, field: str, recorded: Any, options: WorkloadOptions, index: int, reason: str
) -> int:
    """The recorded length of an answer; of request `index` without one, drawn from --output-lengths.

    `reason` says why there may be none where none may be drawn.
    """
    if recorded is not None:
        return place.whole(field, recorded, 1)
    if options.output_lengths is None:
        place.fail(field, f"{reason}; give --output-lengths for such rows.")
    return parse_lengths(options.output_lengths).sample(stream(options.seed, "output lengths", index), 1)[0]
