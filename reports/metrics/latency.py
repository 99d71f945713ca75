"""How long requests took: samples of every latency, and what is made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from backbench.reports.metrics.metric import Metric, Part
from backbench.reports.metrics.requests import Requests
from backbench.reports.metrics.run import RunTables
from backbench.reports.metrics.statistics import Floats, Ints, estimate, summarise

STATISTICS = ("mean", "p50", "p90", "p95", "p99")


@dataclass(frozen=True)
class Samples:
    """The values of one latency in one run, in seconds."""

    values_s: Floats
    never: int = 0
    """Requests that were due and have no value, because they failed or the run was cut off: +inf."""
    owners: Ints | None = None
    """Of pooled values: the request each came from."""

    @property
    def total(self) -> int:
        return len(self.values_s) + self.never

    def summary(self) -> dict[str, Any]:
        return summarise(self.values_s, failures=self.never, owners=self.owners)


def ttft(run: RunTables) -> Samples:
    """First token - intended. A request that a cut-off run left unfinished has one if it began."""
    return _first(run, run.rows.intended_ns)


def ttft_sent(run: RunTables) -> Samples:
    """First token - sent."""
    return _first(run, run.rows.sent_ns)


def _first(run: RunTables, since_ns: Floats) -> Samples:
    rows = run.rows
    seen = ~rows.failed & ~np.isnan(rows.first_ns)
    # A request may complete without a token (its answer was empty): that is no latency, and no failure.
    never = int((~seen & ~rows.completed).sum())
    return Samples((rows.first_ns - since_ns)[seen] / 1e9, never)


def tpot(run: RunTables) -> Samples:
    return _of_completed(run, per_request_tpot(run.rows))


def e2e(run: RunTables) -> Samples:
    return _of_completed(run, (run.rows.last_ns - run.rows.intended_ns) / 1e9)


def normalized(run: RunTables) -> Samples:
    rows = run.rows
    tokens = np.where(rows.output_tokens > 0, rows.output_tokens, np.nan)
    return _of_completed(run, (rows.last_ns - rows.intended_ns) / 1e9 / tokens)


def _of_completed(run: RunTables, values_s: Floats) -> Samples:
    """Those that have the value; a request that did not complete, though it was due, never had it."""
    done = run.rows.completed
    return Samples(values_s[done & ~np.isnan(values_s)], int((~done).sum()))


def itl(run: RunTables) -> Samples:
    values, owners, _ = _inter_token(run)
    return Samples(values, owners=owners)


def _inter_token(run: RunTables) -> tuple[Floats, Ints, int]:
    if run.context.token_times:
        return inter_token(run.rows)
    return (*_joined([], []), len(run.rows))


def icl(run: RunTables) -> Samples:
    values, owners = inter_chunk(run.rows) if run.context.token_times else _joined([], [])
    return Samples(values, owners=owners)


def per_request_tpot(rows: Requests) -> Floats:
    """(t_last - t_first) / (n - 1) in seconds; NaN where n < 2 or n is unknown."""
    enough = rows.output_tokens >= 2
    gaps = np.where(enough, rows.output_tokens - 1, np.nan)
    return (rows.last_ns - rows.first_ns) / gaps / 1e9


def inter_token(rows: Requests) -> tuple[Floats, Ints, int]:
    """Pooled gaps between consecutive tokens (s), the request of each, and how many had no counts.

    A chunk of k tokens that came a gap g after the one before it gives g / k, k times: a gap of zero
    inside a chunk was never seen. The first chunk has no gap. A request with a chunk of unknown count gives
    none at all: which of its gaps were long because of the chunk, nobody knows.
    """
    pooled: list[Floats] = []
    owners: list[int] = []
    uncounted = 0
    for index, (times, counts) in enumerate(zip(rows.chunk_ns, rows.chunk_tokens, strict=True)):
        if np.isnan(counts).any():
            uncounted += 1
        elif len(times) > 1:
            pooled.append(np.repeat(np.diff(times) / counts[1:], counts[1:].astype(int)) / 1e9)
            owners.append(index)
    return (*_joined(pooled, owners), uncounted)


def inter_chunk(rows: Requests) -> tuple[Floats, Ints]:
    """Pooled raw gaps between chunks (s), the stall a user sees; and the request of each."""
    owners = [index for index, times in enumerate(rows.chunk_ns) if len(times) > 1]
    return _joined([np.diff(rows.chunk_ns[index]) / 1e9 for index in owners], owners)


def _joined(pooled: list[Floats], owners: Iterable[int]) -> tuple[Floats, Ints]:
    if not pooled:
        return np.empty(0), np.empty(0, dtype=np.int64)
    return np.concatenate(pooled), np.repeat(list(owners), [len(each) for each in pooled])


def _interactivity(run: RunTables) -> dict[str, Any]:
    """Quantiles of the speeds; a request that never came to its end counts as speed 0, the slow end."""
    found = tpot(run)
    speeds = np.sort(1 / found.values_s[found.values_s > 0])
    ordered = np.concatenate((np.zeros(found.never), speeds))
    return {"p50": estimate(ordered, 0.5), "p10": estimate(ordered, 0.1)}


def _cut_off(run: RunTables) -> bool:
    return run.context.interrupted


def _latency(
    key: str,
    name: str,
    label: str,
    definition: str,
    samples: Callable[[RunTables], Samples],
    *,
    headlines: tuple[str, ...] = (),
    summary: tuple[str, ...] = (),
    **more: Any,
) -> Metric:
    parts = tuple(Part(each, f" {each}", each in headlines, each in summary) for each in STATISTICS)
    # Schema 1 left requests that were due and unfinished out of the quantiles.
    defaults: dict[str, Any] = {
        "compute": lambda run: samples(run).summary(),
        "since": 2,
        "changes": _cut_off,
        "group": "Latency",
        "name": name,
        "parts": parts,
    }
    return Metric(("metrics", key), label, "s", False, definition, **(defaults | more))


def _pooled(key: str, name: str, label: str, definition: str, **more: Any) -> Metric:
    # Schema 1 gave pooled values the intervals of as many independent ones.
    changed: dict[str, Any] = {"changes": _always, "changed": ("low", "high")}
    return _latency(key, name, label, definition, itl if key == "itl_s" else icl, **(changed | more))


def _always(run: RunTables) -> bool:
    return True


def _itl_summary(run: RunTables) -> dict[str, Any]:
    values, owners, uncounted = _inter_token(run)
    return summarise(values, owners=owners) | {"requests_without_counts": uncounted}


METRICS: tuple[Metric, ...] = (
    _latency(
        "ttft_s",
        "Time to first token",
        "TTFT",
        "First token - intended time; in an open loop the wait to be admitted counts.",
        ttft,
        headlines=("p50", "p99"),
        summary=("p50", "p99"),
    ),
    _latency(
        "ttft_sent_s",
        "Time to first token, from sending",
        "TTFT from sending",
        "First token - when the target took the request.",
        ttft_sent,
    ),
    _latency(
        "tpot_s",
        "Time per output token",
        "TPOT",
        "Per request (last - first) / (tokens - 1); every request weighs the same.",
        tpot,
        headlines=("p50",),
        summary=("p50", "p99"),
    ),
    _pooled(
        "itl_s",
        "Inter-token latency",
        "ITL",
        "Gaps between consecutive tokens, pooled; a chunk of several tokens gives its gap divided by them.",
        compute=_itl_summary,
        headlines=("p99",),
        summary=("p50", "p99"),
    ),
    _pooled("icl_s", "Inter-chunk latency", "ICL", "Raw gaps between chunks: the stall a user sees."),
    _latency(
        "e2e_s",
        "End-to-end latency",
        "E2E",
        "Last token - intended time.",
        e2e,
        headlines=("p50",),
        summary=("p50",),
    ),
    _latency(
        "normalized_latency_s",
        "End-to-end latency per output token",
        "Normalized latency",
        "End-to-end latency / output tokens; not TPOT.",
        normalized,
    ),
)

INTERACTIVITY = Metric(
    ("metrics", "interactivity_tokens_per_s"),
    "Output tok/s/user",
    "tok/s/user",
    True,
    "Per request 1 / TPOT: the median and the slow tenth percentile.",
    _interactivity,
    "Throughput",
    parts=(Part("p50", ", median", summary=True), Part("p10", ", slow p10", summary=True)),
    since=2,
    changes=_cut_off,
)
