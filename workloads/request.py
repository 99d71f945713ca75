"""The request stream: what is asked, and when. Everything downstream sees only these two types."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Request:
    """One request of a workload, fully realised: token ids, lengths and intended time."""

    id: int
    """Position in the stream."""
    arrival_ns: int
    """Intended arrival after the run's start; 0 for closed-loop and all-at-once workloads, and for later
    turns that have a think time instead."""
    prompt: tuple[int, ...]
    """Token ids."""
    output_tokens: int
    """Exactly this many tokens are generated (EOS is ignored)."""
    session: str | None = None
    temperature: float = 0.0
    seed: int = 0
    follows: int | None = None
    """The request whose answer must have ended before this one is sent, the turn before; its id is lower."""
    think_ns: int = 0
    """How long after that answer it is sent, or later where its arrival is."""
    extends: int | None = None
    """The request whose context the prompt begins with; mostly the one it follows."""
    kept_tokens: int = 0
    """So many first tokens of the prompt are that context: its prompt as it was sent, then its answer.
    `prompt` has them as planned; a replay puts what was really sent and answered in their place."""


@dataclass(frozen=True)
class Workload:
    """A realised workload: the requests, how they are offered, and how they came to be."""

    name: str
    requests: tuple[Request, ...]
    concurrency: int | None = None
    """Closed loop: at most this many sessions go on at once (a request without a session is one of its own);
    the next begins as one ends. None = open loop."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """Every parameter and transformation that made it, JSON-serialisable."""
    content_hash: str = ""
    """SHA-256 over arrival ns, token ids and output lengths of the realised stream, and what follows what."""
    notes: tuple[str, ...] = ()
    """What a reader must know, e.g. "synthetic tokens: lengths only, no text"."""

    @property
    def schedule_s(self) -> float | None:
        """When the last request is due, in seconds after the start, if answers took no time; None where no
        time is prescribed."""
        times = ((each.arrival_ns, each.follows, each.think_ns) for each in self.requests)
        latest_ns = max(earliest_ns(times), default=0)
        return latest_ns / 1e9 if self.concurrency is None and latest_ns else None


def earliest_ns(times: Iterable[tuple[int, int | None, int]]) -> list[int]:
    """When each is due if answers took no time, from its (arrival, request it follows, think time)."""
    found: list[int] = []
    for arrival_ns, follows, think_ns in times:
        found.append(arrival_ns if follows is None else max(arrival_ns, found[follows] + think_ns))
    return found
