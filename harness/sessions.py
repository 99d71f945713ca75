"""What happens to the requests of a replay, and what an ended one sets free: the turns that follow it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from backbench.errors import HarnessError
from backbench.harness.subjects.target import TokenEvent
from backbench.workloads.request import Request


@dataclass
class Trace:
    """What happened to one request. Times are raw readings of the replay's clock, in ns."""

    request: Request
    """As it is sent: a later turn's prompt holds what was really said once the turn before has ended."""
    intended_ns: int | None = None
    sent_ns: int | None = None
    chunk_ns: list[int] = field(default_factory=list)
    chunk_tokens: list[int | None] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    end_ns: int | None = None
    """When the target reported it finished or failed, or when it was given up unsent."""
    error: str | None = None
    usage_tokens: int | None = None
    """All output tokens by the target's own count; None = it gave none."""

    @property
    def finished(self) -> bool:
        return self.end_ns is not None and self.error is None

    def observe(self, event: TokenEvent) -> None:
        # A chunk without tokens (a role, a usage message) is no token: it must not set the first one.
        if event.error is None and event.count != 0:
            self.chunk_ns.append(event.time_ns)
            self.chunk_tokens.append(event.count)
            self.token_ids.extend(event.token_ids)
        if event.sent_ns is not None:
            self.sent_ns = event.sent_ns
        if event.counts is not None:
            self.chunk_tokens = list(event.counts)
        if event.usage_tokens is not None:
            self.usage_tokens = event.usage_tokens
        if event.finished or event.error is not None:
            self.end_ns = event.time_ns
            self.error = event.error

    @property
    def answer(self) -> list[int] | None:
        """Every token of the answer; None where the target did not give them all, or gave none."""
        told = bool(self.token_ids) and len(self.token_ids) == sum(count or 0 for count in self.chunk_tokens)
        return self.token_ids if told else None


@dataclass(frozen=True)
class Freed:
    """What the end of one request means for its session."""

    turns: tuple[Trace, ...] = ()
    """To be sent now, or after their think times; their prompts are as the session really went."""
    given_up: tuple[Trace, ...] = ()
    """Never to be sent, as what they follow failed; each says so as its error."""
    over: bool = False
    """No request of the session is left."""


class Sessions:
    """Which requests follow which. A request that follows none begins a session, be it of itself alone."""

    def __init__(self, traces: Sequence[Trace]) -> None:
        """Raises HarnessError where a request follows one that does not stand before it."""
        self._traces: dict[int, Trace] = {}
        self._planned: dict[int, Request] = {}
        """As the workload has them; a replayed trace's own request changes."""
        self._later: dict[int, list[Trace]] = {}
        self._first: dict[int, int] = {}
        """Request -> the one that began its session."""
        self._left: dict[int, int] = {}
        """First request of a session -> how many have not ended."""
        for trace in traces:
            self._add(trace)

    def _add(self, trace: Trace) -> None:
        request = trace.request
        first = request.id
        for named in (request.follows, request.extends):
            if named is not None and named not in self._traces:
                raise HarnessError(f"Request {request.id} follows request {named}, which is not before it.")
        if request.follows is not None:
            self._later.setdefault(request.follows, []).append(trace)
            first = self._first[request.follows]
        self._traces[request.id] = trace
        self._planned[request.id] = request
        self._first[request.id] = first
        self._left[first] = self._left.get(first, 0) + 1

    def end(self, trace: Trace) -> Freed:
        """`trace` has ended, and whatever waited for it goes on."""
        first = self._first[trace.request.id]
        later = self._later.pop(trace.request.id, [])
        given_up = self._give_up(later, trace) if trace.error is not None else []
        if not given_up:
            for turn in later:
                turn.request = self._continued(turn.request)
        self._left[first] -= 1 + len(given_up)
        return Freed(() if given_up else tuple(later), tuple(given_up), self._left[first] == 0)

    def _give_up(self, later: list[Trace], failed: Trace) -> list[Trace]:
        """All that follow the failed request, directly or not."""
        found = list(later)
        for turn in found:  # which grows meanwhile
            turn.intended_ns = turn.end_ns = failed.end_ns
            turn.error = f"not sent: request {failed.request.id}, an earlier turn of its session, failed"
            found += self._later.pop(turn.request.id, [])
        return found

    def _continued(self, request: Request) -> Request:
        """The request with its context as it was really sent and answered.

        A shorter answer than planned leaves the prompt that much shorter; a longer one is cut where the
        prompt would be longer than planned, so that it fits the model's context.
        """
        if request.extends is None:
            return request
        before, planned = self._traces[request.extends], self._planned[request.extends]
        if before.end_ns is None:
            return request
        answer = before.answer
        said = request.prompt[len(planned.prompt) : request.kept_tokens] if answer is None else tuple(answer)
        context = (before.request.prompt + said)[: request.kept_tokens]
        return replace(request, prompt=context + request.prompt[request.kept_tokens :])
