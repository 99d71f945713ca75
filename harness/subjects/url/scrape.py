"""A server's own metrics (Prometheus text), before, during and after a run, under our names."""

from __future__ import annotations

import contextlib
import math
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

from backbench.harness.subjects.url.servers import COUNTERS, GAUGES, Server

PERIOD_S = 1.0
"""Often enough to see a queue; rarely enough to cost a server nothing."""
MOST_SAMPLES = 2000
"""Beyond them every other one is dropped, and the period doubles."""
WAIT_S = 5.0
LONGEST_PAGE = 16 * 2**20

OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Asks the server itself: the client processes use no proxy either."""

Fetch = Callable[[], str]
"""Returns the page; raises OSError or ValueError where there is none."""


def parse(text: str) -> dict[str, float]:
    """Name -> its value, summed over its labels; lines that are no sample are skipped, as the format says."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        name, _, rest = line.partition("{")
        if rest:
            values = rest.rpartition("}")[2].split()
        else:
            name, *values = line.split()
        with contextlib.suppress(ValueError, IndexError):
            value = float(values[0])
            if math.isfinite(value):
                found[name.strip()] = found.get(name.strip(), 0.0) + value
    return found


def ours(values: Mapping[str, float], server: Server) -> dict[str, float | None]:
    """Our names -> the server's values; None = it has no such metric."""
    found: dict[str, float | None] = {}
    for name in (*GAUGES, *COUNTERS):
        theirs = [each for each in server.metrics.get(name, ()) if each in values]
        found[name] = values[theirs[0]] if theirs else None
    return found


def fetch_page(url: str, headers: Mapping[str, str]) -> str:
    """The page at `url`; raises OSError or ValueError where there is none."""
    request = urllib.request.Request(url, headers=dict(headers))
    with OPENER.open(request, timeout=WAIT_S) as response:
        text: str = response.read(LONGEST_PAGE).decode("utf-8", "replace")
        return text


class Scraper:
    """Samples the metrics page on a thread, between `start` and `stop`."""

    def __init__(
        self,
        fetch: Fetch,
        server: Server,
        clock: Callable[[], int] = time.perf_counter_ns,
        period_s: float = PERIOD_S,
    ) -> None:
        self._fetch, self._server, self._clock, self._period_s = fetch, server, clock, period_s
        self._before: dict[str, float] | None = None
        self._after: dict[str, float] | None = None
        self._samples: list[tuple[int, dict[str, float | None]]] = []
        self._missing: str | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Look once, and go on on a thread."""
        self._before = self._look()
        if self._before is not None:
            self._thread = threading.Thread(target=self._loop, name="server metrics", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Look a last time."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._after = self._look()

    def _loop(self) -> None:
        while not self._stop.wait(self._period_s):
            values = self._look()
            if values is None:
                return
            self._samples.append((self._clock(), ours(values, self._server)))
            if len(self._samples) > MOST_SAMPLES:
                self._samples = self._samples[::2]
                self._period_s *= 2

    def _look(self) -> dict[str, float] | None:
        try:
            return parse(self._fetch())
        except (OSError, ValueError) as error:
            why = getattr(error, "reason", None) or error
            self._missing = f"the server's metrics could not be read: {' '.join(str(why).split())[:120]}"
            return None

    def section(self, start_ns: int) -> dict[str, Any]:
        """For the record: what grew over the run, and the samples in time after its start; a `reason` where
        something is missing.
        """
        if self._before is None:
            return {"reason": self._missing or "the run has not begun"}
        after = None if self._after is None else ours(self._after, self._server)
        before = ours(self._before, self._server)
        grown = {name: _difference(before[name], None if after is None else after[name]) for name in COUNTERS}
        found: dict[str, Any] = {
            "over_the_run": grown,
            "samples": {
                "time_ns": [time_ns - start_ns for time_ns, _ in self._samples],
                **{name: [values[name] for _, values in self._samples] for name in GAUGES},
            },
            "period_s": self._period_s,
        }
        queries, hits = grown["prefix_cache_queries"], grown["prefix_cache_hits"]
        found["prefix_hit_ratio"] = hits / queries if queries and hits is not None else None
        drafts, accepted = grown["drafts"], grown["accepted_draft_tokens"]
        found["mean_acceptance_length"] = 1 + accepted / drafts if drafts and accepted is not None else None
        if self._missing is not None:
            found["reason"] = self._missing
        elif all(value is None for value in before.values()):
            found["reason"] = f"it names no metric that is known of {self._server.title}"
        return found


def _difference(before: float | None, after: float | None) -> float | None:
    """What a counter grew by; None where it is missing, or where the server started anew."""
    if before is None or after is None or after < before:
        return None
    return after - before
