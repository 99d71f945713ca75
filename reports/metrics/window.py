"""The stretch of a run in which the batch was full and the ramps at both ends play no part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from backbench.reports.metrics.requests import Context, Requests
    from backbench.reports.metrics.statistics import Floats

LEAST_S = 1.0
"""A shorter stretch is no steady state: one pause of the host of 50 ms is 5 % of it already."""
FEWEST_REQUESTS = 10
"""Requests that finish in it: the first and the last of fewer, which its ends cut, weigh a fifth and more."""


@dataclass(frozen=True)
class Window:
    """Half open in time: events in (start_ns, end_ns]."""

    start_ns: float
    end_ns: float

    @property
    def seconds(self) -> float:
        return (self.end_ns - self.start_ns) / 1e9

    def holds(self, times_ns: Floats) -> np.ndarray:
        """bool, one an event."""
        return (times_ns > self.start_ns) & (times_ns <= self.end_ns)


def steady_state(rows: Requests, context: Context) -> tuple[Window | None, str | None]:
    """The window, or None and why there is none.

    From the moment B first tokens were seen until N - B - 1 requests had finished, where N is the number
    of requests sent and B the concurrency, or else the most that were in flight at once, at most the
    engine's batch limit. A batch that starts together and fits the engine: from the last first token to
    the first finish. A window that is shorter, or in which fewer requests finish, than the context asks for
    is none; in the batch's no request can.
    """
    firsts = np.sort(rows.first_ns[~np.isnan(rows.first_ns)])
    finishes = np.sort(finish_times_ns(rows))
    sent = int((~np.isnan(rows.sent_ns)).sum())
    if context.mode == "all_at_once" and sent <= context.batch_limit:
        if len(firsts) < sent or not len(finishes):
            return None, "not every request of the batch gave a first token"
        window = Window(float(firsts[-1]), float(finishes[0]))
        if window.seconds <= 0:
            return None, "the first request finished before the last one began"
        return _long_enough(window, context)
    size = context.concurrency or min(context.batch_limit, most_in_flight(rows))
    last = sent - size - 1
    if last < 1 or len(firsts) < size or len(finishes) < last:
        return None, f"too few requests: {sent} sent with {size} in flight at once"
    window = Window(float(firsts[size - 1]), float(finishes[last - 1]))
    if window.seconds <= 0:
        return None, "the ramps at both ends overlap"
    finished = finished_inside(rows, window)
    if finished < (needed := context.steady_fewest_requests):
        return None, f"only {finished} requests finished while the batch was full, {needed} needed"
    return _long_enough(window, context)


def _long_enough(window: Window, context: Context) -> tuple[Window | None, str | None]:
    if window.seconds < (least := context.steady_least_s):
        return None, f"the batch was full for {window.seconds:.3g} s only, {least:g} s needed"
    return window, None


def finish_times_ns(rows: Requests) -> Floats:
    """When requests ended that gave any token, in the table's order."""
    times: Floats = rows.last_ns[(rows.completed | rows.failed) & ~np.isnan(rows.last_ns)]
    return times


def finished_inside(rows: Requests, window: Window) -> int:
    """How many requests ended inside the window."""
    return int(window.holds(finish_times_ns(rows)).sum())


def most_in_flight(rows: Requests) -> int:
    """The largest number of requests sent and not yet finished at one time."""
    sent = rows.sent_ns[~np.isnan(rows.sent_ns)]
    ended = finish_times_ns(rows)
    times = np.concatenate((sent, ended))
    changes = np.concatenate((np.ones(len(sent)), -np.ones(len(ended))))
    order = np.lexsort((changes, times))  # a slot freed and taken in one instant is not two in flight
    return int(np.cumsum(changes[order]).max()) if len(times) else 0
