"""From the request and step tables to the record's numbers. docs/metrics.md defines every name.

Everything here is a pure function of the two tables and a `Context`, which is why `bench verify` can
recompute a stranger's record.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from backbench.reports.metrics import decode_fit, roofline, schedule
from backbench.reports.metrics.requests import Context, Requests, read_requests
from backbench.reports.metrics.statistics import Floats, estimate, summarise
from backbench.reports.metrics.steps import step_times_ns
from backbench.reports.metrics.window import Window, steady_state

if TYPE_CHECKING:
    import pandas as pd

METRIC_SCHEMA = 1
"""Raised when a metric's definition changes; two records compare only within one."""

SLO_NAMES = ("ttft", "tpot", "e2e")


def compute(requests: pd.DataFrame, steps: pd.DataFrame, context: Context) -> dict[str, dict[str, Any]]:
    """The record's sections that follow from the tables: metrics, schedule, roofline."""
    rows = read_requests(requests, context)
    fit = decode_fit.fit(steps, decode_fit.floors(context.shape, context.peaks))
    return {
        "metrics": metrics_section(rows, steps, context),
        "schedule": schedule.section(rows, context),
        "roofline": roofline.section(rows, steps, context.shape, context.peaks) | {"decode_fit": fit},
    }


def metrics_section(rows: Requests, steps: pd.DataFrame, context: Context) -> dict[str, Any]:
    """The `metrics` section: latencies, rates, goodput, prefix cache, steps, and the context."""
    whole = whole_run(rows, context)
    steady, why_not = steady_state(rows, context)
    rates = {"whole_run": _rate(rows, whole), "steady_state": _rate(rows, steady)}
    totals = {"whole_run": _total_rate(rows, whole), "steady_state": None}
    goodput = _goodput(rows, context, whole)
    per_gpu = {
        name: None if rate is None or not context.gpus else rate / context.gpus
        for name, rate in rates.items()
    }
    return {
        "schema": METRIC_SCHEMA,
        "context": asdict(context),
        "counts": _request_counts(rows),
        **_token_counts(rows),
        **_latencies(rows),
        "output_tokens_per_s": rates,
        "output_tokens_per_s_per_gpu": per_gpu,
        "total_tokens_per_s": totals,
        "requests_per_s": _per_second(int(rows.completed.sum()), whole),
        "goodput_requests_per_s": None if goodput is None else goodput["requests_per_s"],
        "whole_run": {
            "start_s": whole.start_ns / 1e9,
            "end_s": whole.end_ns / 1e9,
            "duration_s": whole.seconds,
        },
        "steady_state": (
            {"start_s": None, "end_s": None, "duration_s": None, "reason": why_not}
            if steady is None
            else {
                "start_s": steady.start_ns / 1e9,
                "end_s": steady.end_ns / 1e9,
                "duration_s": steady.seconds,
            }
        ),
        "goodput": goodput,
        "prefix_cache": _prefix_cache(steps, context),
        "steps": _steps(steps),
    }


def whole_run(rows: Requests, context: Context) -> Window:
    """From the run's start to its last token, or to the interruption."""
    last = rows.last_ns[~np.isnan(rows.last_ns)]
    end_ns = float(context.end_ns) if context.interrupted or not len(last) else float(last.max())
    return Window(0.0, end_ns)


def windows(requests: pd.DataFrame, context: Context) -> tuple[Window, Window | None]:
    """The whole run and its steady state, if there is one."""
    rows = read_requests(requests, context)
    return whole_run(rows, context), steady_state(rows, context)[0]


def _request_counts(rows: Requests) -> dict[str, int]:
    sent = ~np.isnan(rows.sent_ns)
    return {
        "intended": len(rows),
        "sent": int(sent.sum()),
        "completed": int(rows.completed.sum()),
        "failed": int(rows.failed.sum()),
        "unfinished": int((sent & ~rows.completed & ~rows.failed).sum()),
        "never_sent": int((~sent).sum()),
        "wrong_length": int((rows.completed & (rows.output_tokens != rows.requested_tokens)).sum()),
    }


def _token_counts(rows: Requests) -> dict[str, int | None]:
    output = float(rows.output_tokens.sum())
    return {
        "prompt_tokens": int(rows.prompt_tokens.sum()),
        "requested_tokens": int(rows.requested_tokens.sum()),
        "output_tokens": None if np.isnan(output) else int(output),
    }


def _latencies(rows: Requests) -> dict[str, Any]:
    """The per-request metrics and the pooled gaps. Failed requests are +inf in the quantiles."""
    done, failures = rows.completed, int(rows.failed.sum())
    ttft_s = (rows.first_ns - rows.intended_ns)[done] / 1e9
    tpot_s = per_request_tpot(rows)[done]
    tpot_s = tpot_s[~np.isnan(tpot_s)]
    e2e_s = (rows.last_ns - rows.intended_ns)[done] / 1e9
    normalized = e2e_s / rows.output_tokens[done]
    itl_s, itl_requests, uncounted = inter_token(rows)
    icl_s, icl_requests = inter_chunk(rows)
    speeds = np.concatenate((np.sort(1 / tpot_s[tpot_s > 0]), np.empty(0)))
    return {
        "ttft_s": summarise(ttft_s, failures=failures),
        "ttft_sent_s": summarise((rows.first_ns - rows.sent_ns)[done] / 1e9, failures=failures),
        "tpot_s": summarise(tpot_s, failures=failures),
        "itl_s": summarise(itl_s, clusters=itl_requests) | {"requests_without_counts": uncounted},
        "icl_s": summarise(icl_s, clusters=icl_requests),
        "e2e_s": summarise(e2e_s, failures=failures),
        "normalized_latency_s": summarise(normalized[~np.isnan(normalized)], failures=failures),
        "interactivity_tokens_per_s": {
            "p50": _slow(speeds, 0.5, failures),
            "p10": _slow(speeds, 0.1, failures),
        },
    }


def _slow(speeds: Floats, level: float, failures: int) -> dict[str, Any]:
    """A quantile of the speeds; a failed request counts as speed 0, the slow end."""
    return estimate(np.concatenate((np.zeros(failures), speeds)), level)


def per_request_tpot(rows: Requests) -> Floats:
    """(t_last - t_first) / (n - 1) in seconds; NaN where n < 2 or n is unknown."""
    enough = rows.output_tokens >= 2
    gaps = np.where(enough, rows.output_tokens - 1, np.nan)
    return (rows.last_ns - rows.first_ns) / gaps / 1e9


def inter_token(rows: Requests) -> tuple[Floats, int, int]:
    """Pooled gaps between consecutive tokens (s), how many requests gave some, and how many had no counts.

    A chunk of k tokens that came a gap g after the one before it gives g / k, k times: a gap of zero
    inside a chunk was never seen. The first chunk has no gap.
    """
    pooled: list[Floats] = []
    uncounted = 0
    for times, counts in zip(rows.chunk_ns, rows.chunk_tokens, strict=True):
        if np.isnan(counts).any():
            uncounted += 1
        elif len(times) > 1:
            pooled.append(np.repeat(np.diff(times) / counts[1:], counts[1:].astype(int)) / 1e9)
    return (np.concatenate(pooled) if pooled else np.empty(0)), len(pooled), uncounted


def inter_chunk(rows: Requests) -> tuple[Floats, int]:
    """Pooled raw gaps between chunks (s): the stall a user sees; and how many requests gave some."""
    gaps = [np.diff(times) / 1e9 for times in rows.chunk_ns if len(times) > 1]
    return (np.concatenate(gaps) if gaps else np.empty(0)), len(gaps)


def _per_second(count: float, window: Window | None) -> float | None:
    return None if window is None or window.seconds <= 0 else count / window.seconds


def _rate(rows: Requests, window: Window | None) -> float | None:
    """Output tokens seen inside the window per second; None without a window or with unknown counts."""
    if window is None or np.isnan(rows.output_tokens).any():
        return None
    tokens = sum(
        float(counts[window.holds(times)].sum())
        for times, counts in zip(rows.chunk_ns, rows.chunk_tokens, strict=True)
    )
    return _per_second(tokens, window)


def _total_rate(rows: Requests, window: Window) -> float | None:
    """Prompt + output tokens of requests that began to answer, per second."""
    output = float(rows.output_tokens.sum())
    if np.isnan(output):
        return None
    return _per_second(output + float(rows.prompt_tokens[~np.isnan(rows.first_ns)].sum()), window)


def _goodput(rows: Requests, context: Context, whole: Window) -> dict[str, Any] | None:
    """Requests that met every stated limit; a failed or unfinished one misses. None without limits."""
    if not context.slo_s:
        return None
    values = {
        "ttft": (rows.first_ns - rows.intended_ns) / 1e9,
        "tpot": per_request_tpot(rows),
        "e2e": (rows.last_ns - rows.intended_ns) / 1e9,
    }
    met = rows.completed.copy()
    attained = {}
    for name, limit_s in context.slo_s.items():
        applies = ~(rows.completed & np.isnan(values[name]))
        holds = np.less_equal(
            values[name], limit_s, where=~np.isnan(values[name]), out=np.zeros(len(rows), bool)
        )
        met &= holds | ~applies
        attained[name] = float((holds & rows.completed)[applies].mean()) if applies.any() else None
    return {
        "slo_s": dict(context.slo_s),
        "requests_per_s": _per_second(int(met.sum()), whole),
        "attainment": float(met.mean()) if len(rows) else None,
        "attainment_by_slo": attained,
    }


def _prefix_cache(steps: pd.DataFrame, context: Context) -> dict[str, Any]:
    """Prompt tokens found in the cache over prompt tokens scheduled (hits + computed), after the start."""
    measured = steps[steps["end_ns"] > 0]
    hits = int(measured["prefix_hit_tokens"].sum())
    asked = hits + int(measured["num_prefill_tokens"].sum())
    return {
        "ideal": context.ideal_prefix_hit_ratio,
        "realised": hits / asked if asked else None,
        "hit_tokens": hits,
    }


def _steps(steps: pd.DataFrame) -> dict[str, Any]:
    measured = steps[steps["end_ns"] > 0]
    if measured.empty:
        return {"count": 0}
    time_ns = step_times_ns(measured)
    busy_ns = float(time_ns.sum())
    return {
        "count": len(measured),
        "busy_s": busy_ns / 1e9,
        "host_share": float(measured["host_ns"].sum()) / busy_ns if busy_ns else None,
        "mean_s": busy_ns / len(measured) / 1e9,
        "mean_seqs": float(measured["num_seqs"].mean()),
        "graph_share": float(measured["graph"].mean()),
        "preemptions": int(measured["preemptions"].sum()),
        "peak_running": int(measured["running"].max()),
        "peak_waiting": int(measured["waiting"].max()),
        "peak_kv_share": float((measured["kv_blocks_used"] / measured["kv_blocks_total"]).max()),
    }
