"""What a user may ask of a workload, and of the way its requests are offered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backbench.errors import WorkloadError
from backbench.options import option, options_of, settle

if TYPE_CHECKING:
    from backbench.workloads.arrivals import Arrivals

DEFAULT_CONCURRENCY = 16
"""Closed loop, where neither a rate nor a concurrency nor recorded times decide."""
MOST_REQUESTS = 1_000_000
LEAST_TEMPERATURE = 1e-3
"""Near it sampling is greedy already; far below it, divided logits overflow fp32."""
LONGEST_S = 1e9
"""Bound on times within a trace."""


def spec_of(given: Any) -> str:
    """A distribution as `workloads.lengths` reads it, or one number: always that."""
    text = str(given).strip()
    return f"fixed:{text}" if text.isascii() and text.isdigit() else text


@dataclass(frozen=True)
class WorkloadOptions:
    """None everywhere means: the workload's own default. Lengths are in tokens."""

    num_requests: int | None = option(
        None,
        "Measured requests.",
        group="load",
        short="-n",
        unset="48 on a CPU, 512 on a GPU, all of a file",
        minimum=1,
        maximum=MOST_REQUESTS,
    )
    rate: float | None = option(
        None,
        "Open loop at R requests a second; of sessions, so many begin.",
        group="load",
        metavar="R",
        minimum=1e-6,
        maximum=1e6,
    )
    arrival: str | None = option(
        None,
        "With --rate: poisson, constant, gamma or weibull. With rates of its own: ramp:FROM:TO:SECONDS, "
        "steps:RATE@SECONDS,RATE@SECONDS,..., bursts:RATE:ON_S:OFF_S or sine:MEAN:AMPLITUDE:PERIOD_S.",
        group="load",
        unset="poisson",
        metavar="KIND",
    )
    cv: float | None = option(
        None,
        "With --arrival gamma or weibull: the gaps' coefficient of variation; 1 is Poisson, above 1 bursts.",
        group="load",
        metavar="CV",
        minimum=0.05,
        maximum=20,
    )
    concurrency: int | None = option(
        None,
        "Closed loop with N sessions at once, think times included; without sessions, N requests.",
        group="load",
        unset="16 on a CPU, 64 on a GPU",
        minimum=1,
        maximum=2**16,
    )
    time_scale: float | None = option(
        None,
        "A trace's own times, multiplied by X, think times too: 0.5 is twice as fast.",
        group="load",
        metavar="X",
        above=0,
        maximum=1e6,
    )
    rate_scale: float | None = option(
        None,
        "A trace's own times, X times as many requests a second; think times stay.",
        group="load",
        metavar="X",
        minimum=1e-6,
        maximum=1e6,
    )
    think_scale: float | None = option(
        None,
        "Think and tool times of sessions, multiplied by X; 0 is none.",
        group="load",
        metavar="X",
        minimum=0,
        maximum=1e6,
    )
    max_gap_s: float | None = option(
        None,
        "Shorten a trace's silences, and think times, to S seconds.",
        name="max_gap",
        group="load",
        metavar="S",
        above=0,
        maximum=LONGEST_S,
    )
    yes: bool = option(False, "Go on where the schedule is longer than a day.", group="load")
    all_at_once: bool = option(
        False, "Every request at time zero; of sessions, the first turns.", group="load"
    )
    dataset: Path | None = option(
        None, "Real text for sharegpt, in ShareGPT_V3 form.", group="requests", metavar="FILE"
    )
    temperature: float | None = option(
        None,
        f"0 is greedy; otherwise at least {LEAST_TEMPERATURE}.",
        group="requests",
        unset="the workload's own",
        metavar="T",
        minimum=0,
        maximum=100,
    )
    input_lengths: str | None = option(
        None, "synthetic: prompt lengths, such as uniform:100:1024.", group="requests", metavar="SPEC"
    )
    output_lengths: str | None = option(
        None,
        "synthetic: output lengths; a log of requests: of those that tell none.",
        group="requests",
        metavar="SPEC",
    )
    shared_prefix: str | None = option(
        None,
        "synthetic: each prompt starts with one of GROUPS prefixes of TOKENS tokens.",
        group="requests",
        metavar="GROUPSxTOKENS",
    )
    turns: str | None = option(
        None,
        "Turns a session: a number, or a distribution such as uniform:2:6; sharegpt: at most so many.",
        group="requests",
        metavar="N|SPEC",
        read=spec_of,
    )
    think_ms: str | None = option(
        None,
        "Think time before each later turn, in ms: a number, or a distribution such as lognormal:5000:0.6.",
        group="requests",
        unset="none",
        metavar="MS|SPEC",
        read=spec_of,
    )
    length_scale: float | None = option(
        None,
        "Prompts and outputs of a trace, multiplied by X, and the blocks they share with them.",
        group="requests",
        metavar="X",
        above=0,
        maximum=100,
    )
    tick: str | None = option(
        None,
        "mooncake: what to do with 3 s ticks, where the trace was recorded on them.",
        group="requests",
        unset="spread",
        metavar="spread|literal",
        choices={"spread": "spread", "literal": "literal"},
    )
    window_s: tuple[float, float] | None = option(
        None,
        "Keep a trace's arrivals in [START, END) seconds.",
        name="window",
        group="requests",
        metavar="START END",
        minimum=0,
        maximum=LONGEST_S,
    )
    sample: float | None = option(
        None,
        "Keep this fraction of a trace's requests (whole sessions, where it has them).",
        group="requests",
        metavar="P",
        above=0,
        maximum=1,
    )
    sessions: int | None = option(
        None, "Keep a trace's first N sessions.", group="requests", minimum=1, maximum=MOST_REQUESTS
    )
    bad_rows: str | None = option(
        None,
        "A file's rows that are no request: stop there, or leave them out and count them.",
        group="requests",
        unset="stop",
        metavar="stop|skip",
        choices={"stop": "stop", "skip": "skip"},
    )
    clip: bool | None = option(
        None,
        "Shorten requests that exceed the context instead of refusing them.",
        group="requests",
        unset="on for traces of lengths",
    )
    # What follows from the run and its model.
    seed: int = option(0, "Fixes everything that is drawn.", minimum=0, maximum=2**63 - 1)
    vocab_size: int = option(32_000, "Token ids are below it.", minimum=1, maximum=2**31)
    max_len: int | None = option(
        None, "The model's context: prompt and output together; None = unlimited.", minimum=2
    )
    tokenize: Callable[[str], list[int]] | None = field(default=None, compare=False)
    """Turns text into token ids; needed by data sets of text."""
    tokenize_chat: Callable[[list[dict[str, str]]], list[int] | None] | None = field(
        default=None, compare=False
    )
    """Turns messages (role, content) into a prompt by the chat template; None from it: there is none."""

    def __post_init__(self) -> None:
        settle(self, WorkloadError)
        if self.temperature is not None and 0 < self.temperature < LEAST_TEMPERATURE:
            raise WorkloadError(
                f"--temperature must be 0 (greedy) or at least {LEAST_TEMPERATURE}, not {self.temperature:g}."
            )
        if self.window_s is not None and not self.window_s[0] < self.window_s[1]:
            start, end = self.window_s
            raise WorkloadError(f"--window must be START < END, not {start:g} to {end:g}.")

    def require_accepted(self, workload: str, accepted: frozenset[str]) -> None:
        """WorkloadError when an option is set that the workload would have to ignore."""
        typed = {each.field: each.flag for each in options_of(type(self))}
        for each in fields(self):
            if each.name in accepted or each.name in _ALWAYS:
                continue
            if getattr(self, each.name) != each.default:
                usable = ", ".join(typed[name] for name in sorted(accepted))
                raise WorkloadError(f"workload '{workload}' takes no {typed[each.name]}; it takes {usable}.")


# Properties of the model and the run, which every workload may use or not need.
_ALWAYS = frozenset(
    {"seed", "vocab_size", "max_len", "tokenize", "tokenize_chat", "temperature", "clip", "yes"}
)


OFFERS = (
    frozenset({"rate", "arrival", "cv"}),
    frozenset({"concurrency"}),
    frozenset({"time_scale", "rate_scale"}),
    frozenset({"all_at_once"}),
)
"""The ways to offer requests, by their options; they exclude each other."""


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
    rescaled = "--time-scale" if options.rate_scale is None else "--rate-scale"
    given = {
        "--arrival" if options.rate is None else "--rate": options.rate is not None or options.arrival,
        "--concurrency": options.concurrency is not None,
        rescaled: options.time_scale is not None or options.rate_scale is not None,
        "--all-at-once": options.all_at_once,
    }
    named = [name for name, present in given.items() if present]
    if len(named) > 1:
        raise WorkloadError(f"{' and '.join(named)} exclude each other; give one of them.")
    if options.rate is not None or options.arrival is not None:
        from backbench.workloads.arrivals import Arrivals  # numpy, which help does not wait for

        return Offer("open_loop", arrivals=Arrivals(options.arrival or "poisson", options.rate, options.cv))
    if options.cv is not None:
        raise WorkloadError("--cv needs --arrival gamma or weibull and a --rate.")
    if options.concurrency is not None:
        return Offer("closed_loop", concurrency=options.concurrency)
    if given[rescaled]:
        if not has_times:
            raise WorkloadError(f"{rescaled} needs recorded times, and this workload has none; give --rate.")
        return Offer("trace", time_scale=1.0 if options.time_scale is None else options.time_scale)
    if options.all_at_once or all_at_once:
        return Offer("all_at_once")
    if has_times:
        return Offer("trace", time_scale=1.0)
    return Offer("closed_loop", concurrency=DEFAULT_CONCURRENCY)
