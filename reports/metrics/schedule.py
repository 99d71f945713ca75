"""Did the load arrive as intended: offered and achieved arrivals, lag, and burstiness."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from backbench.reports.metrics.metric import Metric, Missing, Part, resolved
from backbench.reports.metrics.requests import Context, Requests
from backbench.reports.metrics.run import RunTables
from backbench.reports.metrics.statistics import Floats, summarise

if TYPE_CHECKING:
    import pandas as pd

LEAST_LATE_S = 0.005
"""A time slice of an operating system's scheduler, which no client is master of."""
LATE_OF_TTFT = 0.10
"""A request that went out late by less of its TTFT waited for the engine, not for the client."""
MOST_LATE = 0.05
"""The share of late requests above which the client counts as saturated."""
FEWEST_SENT = 20
"""With fewer requests one late one would be as much."""


NOT_OPEN = Missing("the target's answers pace the sending: there is no schedule to keep")
TOO_FEW = Missing("fewer than 50 arrivals, or all at once")


def section(rows: Requests, context: Context, steps: pd.DataFrame | None = None) -> dict[str, Any]:
    """The record's `schedule` section."""
    return resolved(_values(rows, context, steps))


def late(rows: Requests, steps: pd.DataFrame | None) -> np.ndarray:
    """Which of the sent requests went out late by the client's own doing: bool[sent].

    A client that offers requests between two steps of the engine is late by the rest of the step under way.
    Late is what went out after the next step, too, by more than LEAST_LATE_S and LATE_OF_TTFT of its TTFT.
    """
    sent = ~np.isnan(rows.sent_ns)
    intended, went_out, first = rows.intended_ns[sent], rows.sent_ns[sent], rows.first_ns[sent]
    allowed = intended.copy()
    if steps is not None and len(steps):
        ends = steps["end_ns"].to_numpy(dtype=np.float64)
        next_step = np.searchsorted(steps["start_ns"].to_numpy(dtype=np.float64), intended)
        allowed = np.maximum(allowed, ends[np.minimum(next_step, len(ends) - 1)])
    lag_s, ttft_s = (went_out - intended) / 1e9, (first - intended) / 1e9
    little = (lag_s <= LEAST_LATE_S) | (lag_s <= LATE_OF_TTFT * ttft_s)  # the latter false without a token
    return (went_out > allowed) & ~little


def _values(rows: Requests, context: Context, steps: pd.DataFrame | None) -> dict[str, Any]:
    """The section; `Missing` where the load has no such number."""
    sent = ~np.isnan(rows.sent_ns)
    lag_s = (rows.sent_ns - rows.intended_ns)[sent] / 1e9
    timed = context.mode == "open"
    offered = _rate(rows.intended_ns[sent]) if timed else None
    # Where the target's answers pace the sending, its rate says nothing about the schedule.
    achieved = _rate(rows.sent_ns[sent]) if timed else None
    too_late = int(late(rows, steps).sum()) if timed else 0
    enough = int(sent.sum()) >= FEWEST_SENT
    few = Missing("all requests arrive at one time") if timed else NOT_OPEN

    def bursts(times_ns: Floats) -> float | Missing:
        if not timed:
            return NOT_OPEN
        found = dispersion(times_ns)
        return TOO_FEW if found is None else found

    return {
        "mode": context.mode,
        "concurrency": Missing("no limit was set") if context.concurrency is None else context.concurrency,
        "offered_requests_per_s": few if offered is None else offered,
        "achieved_requests_per_s": few if achieved is None else achieved,
        "client_saturated": enough and too_late > MOST_LATE * int(sent.sum()),
        "late_requests": too_late if timed else NOT_OPEN,
        "index_of_dispersion": bursts(rows.intended_ns),
        "index_of_dispersion_sent": bursts(rows.sent_ns[sent]),
        "lag_s": summarise(lag_s),
        "never_sent": int((~sent & ~rows.failed).sum()),
    }


def _rate(times_ns: Floats) -> float | None:
    """Gaps per second between the first and the last arrival."""
    span_s = float(times_ns.max() - times_ns.min()) / 1e9 if len(times_ns) > 1 else 0.0
    return (len(times_ns) - 1) / span_s if span_s > 0 else None


def dispersion(times_ns: Floats, per_window: int = 10) -> float | None:
    """Index of dispersion in windows of about `per_window` arrivals; None with fewer than 5 windows."""
    if len(times_ns) < 5 * per_window or times_ns.max() <= times_ns.min():
        return None
    span_ns = int(times_ns.max() - times_ns.min())
    arrivals = [int(time_ns) for time_ns in times_ns]
    return index_of_dispersion(arrivals, max(1, span_ns * per_window // len(arrivals)))


def index_of_dispersion(arrivals_ns: Sequence[int], window_ns: int) -> float | None:
    """Variance over mean of the arrivals counted in whole windows; 1 for Poisson, 0 for constant.

    With m windows of a Poisson process, (m - 1) times this is chi-squared with m - 1 degrees of freedom
    (Cox and Lewis 1966), so its standard deviation is sqrt(2 / (m - 1)). The last, partial window is left
    out. None with fewer than two whole windows.
    """
    if window_ns < 1:
        raise ValueError(f"The window must be at least 1 ns, not {window_ns}.")
    arrivals = np.asarray(arrivals_ns, dtype=np.int64)
    windows = int((arrivals.max() - arrivals.min()) // window_ns) if len(arrivals) else 0
    if windows < 2:
        return None
    places = (arrivals - arrivals.min()) // window_ns
    counts = np.bincount(places[places < windows], minlength=windows)
    return float(counts.var(ddof=1) / counts.mean()) if counts.any() else None


def _schedule(
    key: str,
    label: str,
    unit: str,
    definition: str,
    better: bool | None = None,
    *parts: Part,
    since: int = 1,
) -> Metric:
    def value(run: RunTables) -> Any:
        return _values(run.rows, run.context, run.steps)[key]

    path = ("schedule", key)
    return Metric(path, label, unit, better, definition, value, "Schedule", parts=parts, since=since)


METRICS: tuple[Metric, ...] = (
    _schedule("mode", "Load", "", "Open (timed arrivals), closed (slots) or all at once."),
    _schedule("concurrency", "Concurrency", "", "Slots of a closed loop."),
    _schedule(
        "offered_requests_per_s",
        "Offered requests/s",
        "req/s",
        "Gaps a second between the first and the last intended arrival.",
        None,
        Part(),
    ),
    _schedule(
        "achieved_requests_per_s",
        "Achieved requests/s",
        "req/s",
        "Gaps a second between the first and the last sending.",
        None,
        Part(),
    ),
    _schedule(
        "client_saturated",
        "Client saturated",
        "",
        f"More than {MOST_LATE:.0%} of at least {FEWEST_SENT} requests went out late by the client's doing.",
        since=2,
    ),
    _schedule(
        "late_requests",
        "Requests sent late",
        "",
        f"Sent after the step that followed their time, over 5 ms and {LATE_OF_TTFT:.0%} of their TTFT late.",
        since=2,
    ),
    _schedule(
        "lag_s",
        "Sending lag",
        "s",
        "Sent - intended.",
        False,
        *(Part(key, f" {key}") for key in ("p50", "p99", "max")),
    ),
    _schedule(
        "index_of_dispersion",
        "Index of dispersion of arrivals",
        "",
        "Variance over mean of the arrivals in windows of about ten; 1 for Poisson, 0 for constant.",
        None,
        Part(),
    ),
    _schedule("index_of_dispersion_sent", "Index of dispersion, sent", "", "The same of the sendings."),
    _schedule("never_sent", "Requests never sent", "", "Requests that were due and did not go out."),
)
