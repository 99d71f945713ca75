"""The request stream: what is asked, and when. Everything downstream sees only these two types."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Request:
    """One request of a workload, fully realised: token ids, lengths and intended time."""

    id: int
    """Position in the stream."""
    arrival_ns: int
    """Intended arrival after the run's start; 0 for closed-loop and all-at-once workloads."""
    prompt: tuple[int, ...]
    """Token ids."""
    output_tokens: int
    """Exactly this many tokens are generated (EOS is ignored)."""
    session: str | None = None
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Workload:
    """A realised workload: the requests, how they are offered, and how they came to be."""

    name: str
    requests: tuple[Request, ...]
    concurrency: int | None = None
    """Closed loop: at most this many requests in flight, the next sent as one finishes. None = open loop."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """Every parameter and transformation that made it, JSON-serialisable."""
    content_hash: str = ""
    """SHA-256 over arrival ns, token ids and output lengths of the realised stream."""
    notes: tuple[str, ...] = ()
    """What a reader must know, e.g. "synthetic tokens: lengths only, no text"."""

    @property
    def schedule_s(self) -> float | None:
        """When the last request is due, in seconds after the start; None where no time is prescribed."""
        latest_ns = max((request.arrival_ns for request in self.requests), default=0)
        return latest_ns / 1e9 if self.concurrency is None and latest_ns else None
