"""A workload before it has tokens and times, and how the rows of a trace become one."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from backbench.errors import WorkloadError, shown
from backbench.workloads import transform
from backbench.workloads.options import Offer, WorkloadOptions, choose_offer
from backbench.workloads.trace import TraceRow

MAXIMUM_FILE_REQUESTS = 100_000
"""A whole file up to this many rows is replayed without asking; more needs --num-requests."""
SYNTHETIC_NOTE = "synthetic tokens: the lengths are real, the text is not."
OFFER_OPTIONS = frozenset({"num_requests", "rate", "arrival", "cv", "concurrency", "all_at_once"})
"""Options of every workload whose requests may be offered in any way."""
TRACE_OPTIONS = OFFER_OPTIONS | {"time_scale", "window_s", "sample", "sessions"}
"""Options of a trace with recorded times."""


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
    notes: tuple[str, ...] = (),
) -> Draft:
    """Rows of lengths and times, transformed and cut to `count` (None: all).

    Order: ticks (of `tick_ns`, where the trace was recorded on them), window, sampling, sessions, count.
    """
    records = []
    if tick_ns is not None:
        source = source | {"tick": options.tick or "spread"}
        if source["tick"] == "spread":
            rows, record = transform.spread_ticks(rows, options.seed, tick_ns)
            records.append(record)
    if options.window_s is not None:
        rows, record = transform.window(rows, *options.window_s)
        records.append(record)
    if options.sample is not None:
        rows, record = transform.sample(rows, options.sample, options.seed)
        records.append(record)
    if options.sessions is not None:
        rows, record = transform.limit_sessions(rows, options.sessions)
        records.append(record)
    chosen = cut(name, rows, count)
    offer = choose_offer(options, has_times=True)
    return Draft(name, chosen, offer, source, records, (SYNTHETIC_NOTE, *notes), clip=True)


def cut(name: str, rows: Iterable[TraceRow], count: int | None) -> list[TraceRow]:
    """The first `count` rows, or all of a file that is not too long; WorkloadError where they are missing."""
    chosen = list(itertools.islice(rows, MAXIMUM_FILE_REQUESTS + 1 if count is None else count))
    if count is None and len(chosen) > MAXIMUM_FILE_REQUESTS:
        raise WorkloadError(
            f"{shown(name)} has more than {MAXIMUM_FILE_REQUESTS:,} requests; give --num-requests."
        )
    if not chosen:
        raise WorkloadError(
            f"{shown(name)} has no request left to send; check the file, --window and --sample."
        )
    if count is not None and len(chosen) < count:
        raise WorkloadError(f"{shown(name)} has {len(chosen)} requests, not {count}; lower --num-requests.")
    return chosen
