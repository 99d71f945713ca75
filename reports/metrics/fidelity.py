"""Was the workload replayed as it was recorded: its arrivals, its lengths, and the prefixes it shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from backbench.reports.metrics.engine_steps import ideal_hit_ratio, realised_hit_ratio
from backbench.reports.metrics.metric import Metric, Missing, Part
from backbench.reports.metrics.run import RunTables
from backbench.reports.metrics.schedule import NOT_OPEN
from backbench.reports.metrics.statistics import Floats

NOTHING_SENT = Missing("no request was sent")
NOTHING_COMPLETED = Missing("no request completed")
MOST_DILUTED = 0.01
"""Warm-up prompts computed within the run, over its own: beyond it the hits are not those of the workload."""
DILUTED = Missing(
    "warm-up prompts were computed within the run, and no step tells them apart; give --warmup 0"
)
UNCOUNTED = Missing("the token count of a chunk is unknown")


def ks_distance(first: Floats, second: Floats) -> float:
    """Kolmogorov-Smirnov: the largest gap between the distribution functions of two samples."""
    values = np.concatenate([first, second])
    shares = (np.searchsorted(np.sort(each), values, side="right") / len(each) for each in (first, second))
    return float(np.abs(np.subtract(*shares)).max())


def _arrivals(run: RunTables) -> tuple[Floats, Floats] | Missing:
    """Intended and real times of the requests that were sent."""
    if run.context.mode != "open":
        return NOT_OPEN
    sent = ~np.isnan(run.rows.sent_ns)
    if not sent.any():
        return NOTHING_SENT
    return run.rows.intended_ns[sent], run.rows.sent_ns[sent]


def _arrival_distance(run: RunTables) -> float | Missing:
    found = _arrivals(run)
    return found if isinstance(found, Missing) else ks_distance(*found)


def _largest_lag(run: RunTables) -> float | Missing:
    found = _arrivals(run)
    return found if isinstance(found, Missing) else float((found[1] - found[0]).max()) / 1e9


def _lengths(run: RunTables) -> tuple[Floats, Floats] | Missing:
    """Real and recorded output tokens of the requests that completed."""
    done = run.rows.completed
    if not done.any():
        return NOTHING_COMPLETED
    real = run.rows.output_tokens[done]
    return UNCOUNTED if np.isnan(real).any() else (real, run.rows.requested_tokens[done])


def _exact_lengths(run: RunTables) -> float | Missing:
    found = _lengths(run)
    return found if isinstance(found, Missing) else float((found[0] == found[1]).mean())


def _output_ratio(run: RunTables) -> float | Missing:
    found = _lengths(run)
    return found if isinstance(found, Missing) else float(found[0].sum() / found[1].sum())


def _prefix_hits(run: RunTables) -> float | Missing:
    realised, ideal = realised_hit_ratio(run), ideal_hit_ratio(run)
    if isinstance(ideal, Missing):
        return ideal
    if _late_warmup_tokens(run) > MOST_DILUTED * run.rows.prompt_tokens.sum():
        return DILUTED
    return realised if isinstance(realised, Missing) else realised - ideal


def _late_warmup_tokens(run: RunTables) -> float:
    """Prompt tokens of the warm-up requests whose first token came after the run's start."""
    late, own = (float(each.prompt_tokens[each.first_ns > 0].sum()) for each in (run.everyone, run.rows))
    return late - own


def _fidelity(
    key: str,
    label: str,
    unit: str,
    definition: str,
    compute: Callable[[RunTables], Any],
    better: bool | None = None,
) -> Metric:
    path = ("metrics", "fidelity", key)
    return Metric(path, label, unit, better, definition, compute, "Fidelity", parts=(Part(),), later=True)


METRICS: tuple[Metric, ...] = (
    _fidelity(
        "arrival_distance",
        "Arrivals, KS distance",
        "ratio",
        "Kolmogorov-Smirnov distance of the times of sending from the intended ones: the largest share of the"
        " requests by which the sendings were behind.",
        _arrival_distance,
        False,
    ),
    _fidelity(
        "largest_lag_s",
        "Arrivals, largest lag",
        "s",
        "Largest sent - intended of a timed load.",
        _largest_lag,
        False,
    ),
    _fidelity(
        "exact_lengths",
        "Outputs of the recorded length",
        "ratio",
        "Share of the completed requests that got as many tokens as the workload has.",
        _exact_lengths,
        True,
    ),
    _fidelity(
        "output_ratio",
        "Output tokens, real over recorded",
        "ratio",
        "Output tokens of the completed requests over those that the workload has.",
        _output_ratio,
    ),
    _fidelity(
        "prefix_hits",
        "Prefix hits, realised less ideal",
        "ratio",
        "Realised prefix hit ratio less the ideal one; none where a warm-up's prompts weigh in the former.",
        _prefix_hits,
    ),
)
