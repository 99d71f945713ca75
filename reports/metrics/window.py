"""The stretch of a run in which the batch was full and the ramps at both ends play no part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from backbench.reports.metrics.requests import Context, Requests
    from backbench.reports.metrics.statistics import Floats


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
    the first finish.
    """
    firsts = np.sort(rows.first_ns[~np.isnan(rows.first_ns)])
    finishes = np.sort(rows.last_ns[rows.completed | (rows.failed & ~np.isnan(rows.last_ns))])
    sent = int((~np.isnan(rows.sent_ns)).sum())
    if context.mode == "all_at_once" and sent <= context.batch_limit:
        if len(firsts) < sent or not len(finishes):
            return None, "not every request of the batch gave a first token"
        return _window(
            float(firsts[-1]), float(finishes[0]), "the first request finished before the last one began"
        )
    size = context.concurrency or min(context.batch_limit, most_in_flight(rows))
    last = sent - size - 1
    if last < 1 or len(firsts) < size or len(finishes) < last:
        return None, f"too few requests: {sent} sent with {size} in flight at once"
    return _window(float(firsts[size - 1]), float(finishes[last - 1]), "the ramps at both ends overlap")


def _window(start_ns: float, end_ns: float, otherwise: str) -> tuple[Window | None, str | None]:
    return (Window(start_ns, end_ns), None) if end_ns > start_ns else (None, otherwise)


def most_in_flight(rows: Requests) -> int:
    """The largest number of requests sent and not yet finished at one time."""
    sent = rows.sent_ns[~np.isnan(rows.sent_ns)]
    ended = rows.last_ns[(rows.completed | rows.failed) & ~np.isnan(rows.last_ns)]
    times = np.concatenate((sent, ended))
    changes = np.concatenate((np.ones(len(sent)), -np.ones(len(ended))))
    order = np.lexsort((changes, times))  # a slot freed and taken in one instant is not two in flight
    return int(np.cumsum(changes[order]).max()) if len(times) else 0
