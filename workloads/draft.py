"""A workload before it has tokens and times, and how the rows of a trace become one."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from backbench.errors import WorkloadError, shown
from backbench.workloads import transform
from backbench.workloads.lengths import parse_lengths
from backbench.workloads.options import Offer, WorkloadOptions, choose_offer
from backbench.workloads.readers.text import BadRows
from backbench.workloads.streams import stream
from backbench.workloads.trace import TraceRow

MAXIMUM_FILE_REQUESTS = 100_000
"""A whole file up to this many rows is replayed without asking; more needs --num-requests."""
SYNTHETIC_NOTE = "synthetic tokens: the lengths are real, the text is not."
OFFER_OPTIONS = frozenset({"num_requests", "rate", "arrival", "cv", "concurrency", "all_at_once"})
"""Options of every workload whose requests may be offered in any way."""
TIME_OPTIONS = frozenset({"time_scale", "rate_scale", "max_gap_s"})
"""Options of requests with recorded times."""
SESSION_OPTIONS = frozenset({"turns", "think_ms", "think_scale"})
"""Options of sessions whose turns are drawn, or that have no think times."""
TRACE_OPTIONS = (
    OFFER_OPTIONS | TIME_OPTIONS | {"window_s", "sample", "sessions", "think_scale", "length_scale"}
)
"""Options of a trace of lengths."""


@dataclass(frozen=True)
class Draft:
    """A workload before it has tokens and times."""

    name: str
    rows: list[TraceRow]
    offer: Offer
    source: dict[str, Any]
    """Where the rows come from, for the record."""
    transformations: list[dict[str, Any]] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    temperature: float = 0.0
    """Where neither the options nor the row name one."""
    clip: bool = False
    """Whether clipping is the default here."""


def draft_trace(
    name: str,
    rows: Iterable[TraceRow],
    source: dict[str, Any],
    options: WorkloadOptions,
    *,
    count: int | None,
    tick_ns: int | None = None,
    timed: bool = True,
    notes: tuple[str, ...] = (),
    bad: BadRows | None = None,
) -> Draft:
    """Rows of lengths and times, transformed and cut to `count` (None: all).

    Order: ticks (of `tick_ns`, where the trace was recorded on them), window, sampling, sessions, count,
    silences. The first request arrives at 0, before the window is applied and after all. `bad` is what the
    rows' reader counts in; `timed` is False where they have no times.
    """
    records = []
    offer = choose_offer(options, has_times=timed)
    if timed:
        if tick_ns is not None:
            rows, source, record = _untick(name, rows, source, options, tick_ns, offer)
            records += [record] if record else []
        rows, record = transform.rebase(rows)
        records += [record] if record else []
    elif options.window_s is not None:
        raise WorkloadError(f"{shown(name)} has no times, so --window does not apply.")
    if options.window_s is not None:
        rows, record = transform.window(rows, *options.window_s)
        records.append(record)
    if options.sample is not None:
        rows, record = transform.sample(rows, options.sample, options.seed)
        records.append(record)
    if options.sessions is not None:
        rows, record = transform.limit_sessions(rows, options.sessions)
        records.append(record)
    chosen = cut(name, rows, count, bad)
    chosen, timing = settle_times(chosen, options) if timed else _settle_untimed(name, chosen, options)
    source = source | (bad.record() if bad is not None else {})
    return Draft(name, chosen, offer, source, records + timing, (SYNTHETIC_NOTE, *notes), clip=True)


def settle_times(
    rows: list[TraceRow], options: WorkloadOptions
) -> tuple[list[TraceRow], list[dict[str, Any]]]:
    """The chosen rows from time 0 on, with silences of `--max-gap` at most, and the records of both."""
    records = []
    rebased, record = transform.rebase(rows)
    records += [record] if record else []
    settled = list(rebased)
    if options.max_gap_s is not None:
        settled, record = transform.cap_gaps(settled, options.max_gap_s)
        records.append(record)
    return settled, records


def _settle_untimed(
    name: str, rows: list[TraceRow], options: WorkloadOptions
) -> tuple[list[TraceRow], list[dict[str, Any]]]:
    """Sessions without times of their own still have think times that may be too long."""
    if options.max_gap_s is None:
        return rows, []
    if all(row.follow is None or row.follow.think_ns is None for row in rows):
        raise WorkloadError(f"{shown(name)} has neither times nor think times, so --max-gap does not apply.")
    capped, record = transform.cap_think(rows, options.max_gap_s)
    return capped, [record]


def _untick(
    name: str,
    rows: Iterable[TraceRow],
    source: dict[str, Any],
    options: WorkloadOptions,
    tick_ns: int,
    offer: Offer,
) -> tuple[Iterable[TraceRow], dict[str, Any], dict[str, Any] | None]:
    """Spread the ticks of a trace that was recorded on them, where its times are what is replayed."""
    rows, ticks = transform.on_ticks(rows, tick_ns)
    if options.tick is not None and not ticks:
        raise WorkloadError(
            f"{shown(name)} was not recorded on ticks of {tick_ns / 1e9:g} s; leave out --tick."
        )
    if not ticks:
        return rows, source, None
    source = source | {"tick": options.tick or "spread"}
    if source["tick"] == "literal" or offer.mode != "trace":
        return rows, source, None
    spread, record = transform.spread_ticks(rows, options.seed, tick_ns)
    return spread, source, record


def cut(name: str, rows: Iterable[TraceRow], count: int | None, bad: BadRows | None = None) -> list[TraceRow]:
    """The first `count` rows, or all of a file that is not too long; WorkloadError where they are missing."""
    chosen = list(itertools.islice(rows, MAXIMUM_FILE_REQUESTS + 1 if count is None else count))
    if count is None and len(chosen) > MAXIMUM_FILE_REQUESTS:
        raise WorkloadError(
            f"{shown(name)} has more than {MAXIMUM_FILE_REQUESTS:,} requests; give --num-requests."
        )
    if not chosen and bad is not None and bad.first is not None:
        raise WorkloadError(f"{shown(name)} has no row that is a request; the first: {shown(bad.first, 150)}")
    if not chosen:
        raise WorkloadError(
            f"{shown(name)} has no request left to send; check the file, --window and --sample."
        )
    if count is not None and len(chosen) < count:
        raise WorkloadError(f"{shown(name)} has {len(chosen)} requests, not {count}; lower --num-requests.")
    return chosen


def think_times_ns(options: WorkloadOptions, count: int) -> list[int]:
    """`count` think times from `--think-ms`; 0 without. WorkloadError where there are no turns."""
    if options.think_ms is None:
        return [0] * count
    if options.turns is None:
        raise WorkloadError("--think-ms is between turns; give --turns, too.")
    drawn = parse_lengths(options.think_ms).sample(stream(options.seed, "think times"), count)
    return [time_ms * 1_000_000 for time_ms in drawn]
