"""The answer to a streamed request: bytes to server-sent events, events to counted tokens."""

from __future__ import annotations

import json
from typing import Any

LONGEST_EVENT = 2**20
"""Bytes; a longer event is no chunk of an answer."""
FIELDS = (b"event", b"id", b"retry")
SHOWN = ("content", "reasoning_content", "reasoning", "tool_calls", "refusal")
"""Fields of a chat delta that generated tokens show themselves in."""
LONGEST_MESSAGE = 120
"""Characters of a server's own message that are kept."""


class StreamError(Exception):
    """The server's answer is not one, or says that it failed; the message is one line for the record."""


class EventStream:
    """Bytes as they arrive -> the `data` of whole events (server-sent events; a CR alone ends no line)."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self._held = 0

    def feed(self, received: bytes) -> list[bytes]:
        """The events that `received` completes; StreamError where a line is none of a stream."""
        lines = (self._rest + received).split(b"\n")
        self._rest = lines.pop()
        if len(self._rest) + self._held > LONGEST_EVENT:
            raise StreamError(f"malformed stream: an event of more than {LONGEST_EVENT} bytes")
        found = []
        for line in lines:
            if line.endswith(b"\r"):
                line = line[:-1]
            if line.startswith(b"data:"):
                self._data.append(line[6:] if line[5:6] == b" " else line[5:])
                self._held += len(line)
            elif not line:
                if self._data:
                    found.append(self._data[0] if len(self._data) == 1 else b"\n".join(self._data))
                    self._data, self._held = [], 0
            elif not line.startswith(b":") and line.split(b":", 1)[0] not in FIELDS:
                raise StreamError("malformed stream: a line that belongs to no event")
        return found


class Answer:
    """What the events of one request have said so far."""

    __slots__ = (
        "counted",
        "done",
        "finish_reason",
        "received_ns",
        "token_ids",
        "uncounted",
        "usage",
        "written_ns",
    )

    def __init__(self) -> None:
        self.done = False
        """The server said that nothing follows."""
        self.finish_reason: str | None = None
        self.usage: dict[str, Any] | None = None
        """The last that it said."""
        self.counted = 0
        """Tokens of events that say their number."""
        self.uncounted = 0
        """Events that show some tokens and do not say how many."""
        self.token_ids: list[int] = []
        """Those of the last event."""
        self.written_ns: int | None = None
        """When the null server wrote the last event, on this machine's clock."""
        self.received_ns: int | None = None
        """When the null server had read the request."""

    def take(self, event: bytes) -> int | None:
        """Tokens that became visible: 0 = the event is about something else, None = some, uncounted.

        Raises StreamError where it is malformed, or says that the request failed.
        """
        if event == b"[DONE]":
            self.done = True
            return 0
        try:
            return self._take(json.loads(event))
        except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
            raise StreamError("malformed stream: an event that is no chunk of an answer") from None

    def _take(self, data: dict[str, Any]) -> int | None:
        if (error := data.get("error")) is not None:
            raise StreamError(f"the server failed: {message_of(error)}")
        self.written_ns = data.get("written_ns")
        if self.received_ns is None:
            self.received_ns = data.get("received_ns")
        total = None
        if (usage := data.get("usage")) is not None:
            total = usage.get("completion_tokens")
            if total is not None:
                total = _count(total)
            self.usage = usage
        choices = data["choices"] if "choices" in data or usage is None else None
        if not choices:
            return 0
        choice = choices[0]
        if (reason := choice.get("finish_reason")) is not None:
            self.finish_reason = str(reason)
        return self._tokens(choice, total)

    def _tokens(self, choice: dict[str, Any], total: int | None) -> int | None:
        self.token_ids = [_count(each) for each in choice.get("token_ids") or ()]
        if self.token_ids:
            count = len(self.token_ids)
        elif total is not None and not self.uncounted:
            count = total - self.counted
            if count < 0:
                raise StreamError("malformed stream: the number of tokens went down")
        else:
            delta = choice.get("delta")
            shown = choice.get("text") or (delta and any(delta.get(each) for each in SHOWN))
            self.uncounted += bool(shown)
            return None if shown else 0
        self.counted += count
        return count

    @property
    def total(self) -> int | None:
        """Output tokens by the server's own count; None = it did not say."""
        return None if self.usage is None else self.usage.get("completion_tokens")

    @property
    def one_each(self) -> bool:
        """Every event that did not say its number held one token.

        Each showed at least one, and the server counted no more in all.
        """
        return bool(self.uncounted) and self.total == self.counted + self.uncounted


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
        raise ValueError(value)
    return value


def message_of(error: Any) -> str:
    """A server's message on one line and short, whether it stands in an object or alone."""
    for key in ("message", "detail", "error"):
        if isinstance(error, dict) and error.get(key):
            return message_of(error[key])
    text = " ".join(str(error).split())
    return text if len(text) <= LONGEST_MESSAGE else text[: LONGEST_MESSAGE - 3] + "..."
