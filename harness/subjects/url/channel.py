"""What a run and its client processes say to each other: pickles, a length before each, over a socket pair.

Both ends are processes of one run on one machine; nothing from outside ever comes this way.
"""

from __future__ import annotations

import pickle
import struct
from dataclasses import dataclass, field
from typing import Any, NamedTuple

_LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class ClientSettings:
    """What one client process is told first."""

    url: str
    """Where requests are posted."""
    headers: dict[str, str] = field(default_factory=dict)
    connect_timeout_s: float = 10.0
    first_token_timeout_s: float = 300.0
    token_timeout_s: float = 120.0
    request_timeout_s: float = 3600.0


class Seen(NamedTuple):
    """What became visible of one request."""

    request_id: int
    time_ns: int
    tokens: int | None
    """Of this chunk; None = some, and nobody said how many."""
    token_ids: tuple[int, ...] = ()
    finished: bool = False
    error: str | None = None
    sent_ns: int | None = None
    """When the request went out; in its first chunk and at its end."""
    counts: tuple[int, ...] | None = None
    """At the end, where it is known only then: tokens of every chunk."""
    usage: dict[str, Any] | None = None
    """At the end: the server's own counts."""


def packed(message: Any) -> bytes:
    """One message as it is sent."""
    content = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(content)) + content


class Unpacker:
    """Bytes as they arrive -> whole messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, received: bytes) -> list[Any]:
        """The messages that `received` completes."""
        self._buffer += received
        found, at = [], 0
        while len(self._buffer) - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, at)
            end = at + _LENGTH.size + length
            if len(self._buffer) < end:
                break
            found.append(pickle.loads(bytes(self._buffer[at + _LENGTH.size : end])))
            at = end
        del self._buffer[:at]
        return found
