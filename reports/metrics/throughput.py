"""What a run made a second, in its two stretches, and what of it met its limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from backbench.reports.metrics.latency import INTERACTIVITY, per_request_tpot
from backbench.reports.metrics.metric import Metric, Missing, Part
from backbench.reports.metrics.requests import Requests
from backbench.reports.metrics.run import RunTables
from backbench.reports.metrics.statistics import Floats
from backbench.reports.metrics.window import Window

UNCOUNTED = "the token count of a chunk is unknown"


def tokens_inside(rows: Requests, window: Window) -> float:
    """Output tokens seen inside the window; NaN where a chunk's count is unknown and matters."""
    return sum(
        _tokens_of_one(window.holds(times), counts, whole)
        for times, counts, whole in zip(rows.chunk_ns, rows.chunk_tokens, rows.output_tokens, strict=True)
    )


def _tokens_of_one(inside: np.ndarray, counts: Floats, whole: float) -> float:
    """Those of a request; all of them are known by their sum, too, and none need no count."""
    return float(whole) if inside.all() and len(inside) else float(counts[inside].sum())


def prompt_tokens_inside(rows: Requests, window: Window) -> float:
    """Prompt tokens of the requests whose first token was seen inside the window."""
    return float(rows.prompt_tokens[window.holds(rows.first_ns)].sum())


def _per_second(count: float, window: Window) -> float | Missing:
    if np.isnan(count):
        return Missing(UNCOUNTED)
    return Missing("the stretch has no length") if window.seconds <= 0 else count / window.seconds


Rate = float | Missing


def _in_both(run: RunTables, rate: Callable[[Window], Rate]) -> dict[str, Rate]:
    """The rate over the whole run and over its steady state."""
    steady, why_not = run.steady_or_why_not
    if not run.context.token_times:
        steady, why_not = None, "the tokens' own times are unknown"
    return {
        "steady_state": Missing(why_not or "") if steady is None else rate(steady),
        "whole_run": rate(run.whole),
    }


def output_rates(run: RunTables) -> dict[str, Rate]:
    """Output tokens a second, whoever asked for them."""
    return _in_both(run, lambda window: _per_second(tokens_inside(run.everyone, window), window))


def _per_gpu(run: RunTables) -> dict[str, Rate]:
    gpus = run.context.gpus
    if not gpus:
        return dict.fromkeys(("steady_state", "whole_run"), Missing("the engine ran on no GPU"))
    return {
        name: rate if isinstance(rate, Missing) else rate / gpus for name, rate in output_rates(run).items()
    }


def _total_rates(run: RunTables) -> dict[str, Rate]:
    def rate(window: Window) -> Rate:
        tokens = tokens_inside(run.everyone, window) + prompt_tokens_inside(run.everyone, window)
        return _per_second(tokens, window)

    return _in_both(run, rate)


def _request_rate(run: RunTables) -> Rate:
    return _per_second(float(run.rows.completed.sum()) + _warmup_finished(run), run.whole)


def _warmup_finished(run: RunTables) -> int:
    """Warm-up requests that finished inside the whole run."""

    def inside(rows: Requests) -> int:
        return int((rows.completed & run.whole.holds(rows.last_ns)).sum())

    return inside(run.everyone) - inside(run.rows)


def _within(rows: Requests, name: str, limit_s: float) -> tuple[np.ndarray, np.ndarray]:
    """Which requests completed within the limit, and to which it applies: bool[requests] each."""
    if name == "tpot":
        values = per_request_tpot(rows)
    else:
        values = ((rows.first_ns if name == "ttft" else rows.last_ns) - rows.intended_ns) / 1e9
    known = ~np.isnan(values)
    within = np.less_equal(values, limit_s, where=known, out=np.zeros(len(rows), bool))
    return within & rows.completed, ~(rows.completed & ~known)


def met_and_due(rows: Requests, name: str, limit_s: float) -> tuple[int, int]:
    """How many requests met a limit on "ttft", "tpot" or "e2e", and to how many it applies; failures miss."""
    holds, applies = _within(rows, name, limit_s)
    return int(holds[applies].sum()), int(applies.sum())


def _goodput(run: RunTables) -> dict[str, Any] | Missing:
    """Requests that met every stated limit; a failed or unfinished one misses."""
    rows, limits = run.rows, run.context.slo_s
    if not limits:
        return Missing("no SLO was stated")
    met = rows.completed.copy()
    attained: dict[str, float | Missing] = {}
    for name, limit_s in limits.items():
        holds, applies = _within(rows, name, limit_s)
        met &= holds | ~applies
        attained[name] = (
            float(holds[applies].mean()) if applies.any() else Missing("it applies to no request")
        )
    return {
        "slo_s": dict(limits),
        "requests_per_s": _per_second(float(met.sum()), run.whole),
        "attainment": float(met.mean()) if len(rows) else Missing("no request was due"),
        "attainment_by_slo": attained,
    }


def _goodput_rate(run: RunTables) -> Rate:
    found = _goodput(run)
    if isinstance(found, Missing):
        return found
    rate: Rate = found["requests_per_s"]
    return rate


def _both(headline: bool = False, summary: tuple[str, ...] = ()) -> tuple[Part, ...]:
    return tuple(
        Part(key, f", {words}", headline, key in summary)
        for key, words in (("steady_state", "steady state"), ("whole_run", "whole run"))
    )


METRICS: tuple[Metric, ...] = (
    Metric(
        ("metrics", "output_tokens_per_s"),
        "Output tok/s",
        "tok/s",
        True,
        "Output tokens seen inside the stretch, the handed-over warm-up requests' too, over its seconds.",
        output_rates,
        "Throughput",
        parts=_both(headline=True, summary=("steady_state", "whole_run")),
    ),
    Metric(
        ("metrics", "output_tokens_per_s_per_gpu"),
        "Output tok/s per GPU",
        "tok/s",
        True,
        "Output tokens a second over the number of GPUs.",
        _per_gpu,
        "Throughput",
        parts=_both(),
    ),
    Metric(
        ("metrics", "total_tokens_per_s"),
        "Total (input + output) tok/s",
        "tok/s",
        True,
        "Output tokens and the prompts of requests whose first token lies inside the stretch, a second.",
        _total_rates,
        "Throughput",
        parts=_both(summary=("whole_run",)),
        since=2,
        changed=("steady_state",),
    ),
    Metric(
        ("metrics", "requests_per_s"),
        "Requests/s",
        "req/s",
        True,
        "Requests that finished inside the whole run, handed-over warm-up requests too, over its seconds.",
        _request_rate,
        "Throughput",
        parts=(Part(summary=True),),
    ),
    Metric(
        ("metrics", "goodput_requests_per_s"),
        "Goodput",
        "req/s",
        True,
        "Measured requests that met every stated SLO, a second.",
        _goodput_rate,
        "Throughput",
        parts=(Part(summary=True),),
    ),
    Metric(
        ("metrics", "goodput"),
        "SLO attainment",
        "ratio",
        True,
        "Share of the measured requests that met every stated SLO; failures miss.",
        _goodput,
        "Throughput",
        parts=(),
    ),
    INTERACTIVITY,
)
