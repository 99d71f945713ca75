"""What a replay drives: anything that takes requests and gives tokens back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from backbench.workloads.request import Request


@dataclass(frozen=True)
class TokenEvent:
    """`count` tokens of a request became visible at `time_ns` (perf_counter_ns)."""

    request_id: int
    time_ns: int
    count: int | None
    """Tokens in this chunk; None when the target does not say."""
    token_ids: tuple[int, ...] = ()
    finished: bool = False
    error: str | None = None
    """Set when the request failed; then `count` is 0 and `finished` is True."""
    sent_ns: int | None = None
    """When the request went out, where the target knows it better than at `submit`."""
    counts: tuple[int, ...] | None = None
    """At the end, where it is known only then: tokens of every chunk so far."""
    usage_tokens: int | None = None
    """At the end: all output tokens by the target's own count, where it gives one."""


class Target(Protocol):
    """Replay calls `submit` when a request is due and `poll` in a loop; both return promptly."""

    def submit(self, request: Request) -> int:
        """Hand the request over; returns the perf_counter_ns at which the target took it."""

    def poll(self, deadline_ns: int | None) -> list[TokenEvent]:
        """Advance, and return what became visible.

        May block until something does, but, with nothing in flight, no later than `deadline_ns`.
        """

    def abort(self) -> None:
        """Drop everything in flight."""
