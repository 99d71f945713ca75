"""What a user may ask of a workload, and how its requests are offered. Validation lives here, at the edge."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from backbench.errors import WorkloadError
from backbench.workloads.arrivals import Arrivals, check_rate

DEFAULT_CONCURRENCY = 16
"""Closed loop, where neither a rate nor a concurrency nor recorded times decide."""


@dataclass(frozen=True)
class WorkloadOptions:
    """None everywhere means: the workload's own default. Lengths are in tokens."""

    num_requests: int | None = None
    seed: int = 0
    """Fixes everything that is drawn."""
    vocab_size: int = 32_000
    """Token ids are below it."""
    max_len: int | None = None
    """The model's context: prompt and output together; None = unlimited."""
    rate: float | None = None
    """Open loop at this many requests per second."""
    arrival: str | None = None
    """See workloads/arrivals.py; "poisson" where only a rate is given."""
    cv: float | None = None
    """Coefficient of variation of the gaps, for gamma and weibull arrivals."""
    concurrency: int | None = None
    """Closed loop with this many requests in flight."""
    time_scale: float | None = None
    """Recorded times multiplied by this: 0.5 is twice as fast."""
    all_at_once: bool = False
    dataset: str | Path | None = None
    """A ShareGPT_V3 file for `sharegpt`."""
    tokenize: Callable[[str], list[int]] | None = field(default=None, compare=False)
    """Turns text into token ids; needed by data sets of text."""
    input_lengths: str | None = None
    """A spec of workloads/lengths.py, for `synthetic`."""
    output_lengths: str | None = None
    temperature: float | None = None
    shared_prefix: str | None = None
    """GROUPSxTOKENS: each prompt starts with one of GROUPS prefixes of TOKENS tokens (`synthetic`)."""
    turns: int | None = None
    """Turns a session, each repeating the session so far (`synthetic`)."""
    tick: str | None = None
    """Mooncake: "spread" (default) over the 3 s tick, or "literal"."""
    window_s: tuple[float, float] | None = None
    """Keep a trace's arrivals in [start, end) seconds."""
    sample: float | None = None
    """Keep this fraction of a trace's requests (whole sessions, where it has them)."""
    sessions: int | None = None
    """Keep a trace's first sessions only."""
    clip: bool | None = None
    """Shorten requests to `max_len` instead of refusing them; on by default for traces of lengths."""

    def __post_init__(self) -> None:
        for name in ("num_requests", "concurrency", "turns", "sessions", "vocab_size"):
            _at_least(name, getattr(self, name), 1)
        _at_least("seed", self.seed, 0)
        _at_least("max_len", self.max_len, 2)
        if self.rate is not None:
            check_rate(self.rate)
        if self.time_scale is not None and not 0 < self.time_scale <= 1e6:
            raise WorkloadError(f"--time-scale must be above 0 and at most 1e6, not {self.time_scale:g}.")
        if self.sample is not None and not 0 < self.sample <= 1:
            raise WorkloadError(f"--sample must be a fraction in (0, 1], not {self.sample:g}.")
        if self.temperature is not None and not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise WorkloadError(f"--temperature must be 0 or more, not {self.temperature:g}.")
        if self.tick not in (None, "spread", "literal"):
            raise WorkloadError(f"--tick must be spread or literal, not '{self.tick}'.")
        if self.window_s is not None and not 0 <= self.window_s[0] < self.window_s[1] < 1e9:
            start, end = self.window_s
            raise WorkloadError(f"--window must be START < END in seconds from 0, not {start:g} to {end:g}.")

    def require_accepted(self, workload: str, accepted: frozenset[str]) -> None:
        """WorkloadError when an option is set that the workload would have to ignore."""
        for option in fields(self):
            if option.name in accepted or option.name in _ALWAYS:
                continue
            if getattr(self, option.name) != option.default:
                usable = ", ".join(flag(name) for name in sorted(accepted))
                raise WorkloadError(f"workload '{workload}' takes no {flag(option.name)}; it takes {usable}.")


# Properties of the model and the run, which every workload may use or not need.
_ALWAYS = frozenset({"seed", "vocab_size", "max_len", "tokenize", "temperature", "clip"})


def flag(name: str) -> str:
    """An option's name as it is typed: `window_s` is --window."""
    return "--" + name.removesuffix("_s").replace("_", "-")


def _at_least(name: str, value: int | None, minimum: int) -> None:
    if value is not None and value < minimum:
        raise WorkloadError(f"{flag(name)} must be at least {minimum}, not {value}.")


@dataclass(frozen=True)
class Offer:
    """How requests are offered; exactly one of four modes."""

    mode: str
    """closed_loop, open_loop (an arrival process), trace (recorded times) or all_at_once."""
    concurrency: int | None = None
    arrivals: Arrivals | None = None
    time_scale: float | None = None

    def parameters(self) -> dict[str, Any]:
        """For Workload.parameters."""
        found: dict[str, Any] = {"mode": self.mode}
        if self.concurrency is not None:
            found["concurrency"] = self.concurrency
        if self.arrivals is not None:
            found |= {"arrival": self.arrivals.spec, "rate": self.arrivals.rate, "cv": self.arrivals.cv}
        if self.time_scale is not None:
            found["time_scale"] = self.time_scale
        return found


def choose_offer(options: WorkloadOptions, *, has_times: bool, all_at_once: bool = False) -> Offer:
    """The one mode the options name, or the default.

    The default is all at once if `all_at_once`, recorded times if the workload has them (`has_times`), and
    otherwise a closed loop of DEFAULT_CONCURRENCY, which suits a machine of any speed.
    """
    given = {
        "--arrival" if options.rate is None else "--rate": options.rate is not None or options.arrival,
        "--concurrency": options.concurrency is not None,
        "--time-scale": options.time_scale is not None,
        "--all-at-once": options.all_at_once,
    }
    named = [name for name, present in given.items() if present]
    if len(named) > 1:
        raise WorkloadError(f"{' and '.join(named)} exclude each other; give one of them.")
    if options.rate is not None or options.arrival is not None:
        return Offer("open_loop", arrivals=Arrivals(options.arrival or "poisson", options.rate, options.cv))
    if options.cv is not None:
        raise WorkloadError("--cv needs --arrival gamma or weibull and a --rate.")
    if options.concurrency is not None:
        return Offer("closed_loop", concurrency=options.concurrency)
    if options.time_scale is not None:
        if not has_times:
            raise WorkloadError("--time-scale needs recorded times, and this workload has none; give --rate.")
        return Offer("trace", time_scale=options.time_scale)
    if options.all_at_once or all_at_once:
        return Offer("all_at_once")
    if has_times:
        return Offer("trace", time_scale=1.0)
    return Offer("closed_loop", concurrency=DEFAULT_CONCURRENCY)
