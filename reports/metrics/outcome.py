"""What became of the requests and which stretches of time the numbers are about."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from backbench.reports.metrics.metric import Metric, Missing
from backbench.reports.metrics.run import RunTables
from backbench.reports.metrics.window import Window, finished_inside


def _counts(run: RunTables) -> dict[str, int]:
    rows = run.rows
    sent, known = ~np.isnan(rows.sent_ns), ~np.isnan(rows.output_tokens)
    return {
        "intended": len(rows),
        "sent": int(sent.sum()),
        "completed": int(rows.completed.sum()),
        "failed": int(rows.failed.sum()),
        "unfinished": int((sent & ~rows.completed & ~rows.failed).sum()),
        # A turn that was given up counts as failed: it was never due.
        "never_sent": int((~sent & ~rows.failed).sum()),
        "wrong_length": int((rows.completed & known & (rows.output_tokens != rows.requested_tokens)).sum()),
    }


def _output_tokens(run: RunTables) -> int | Missing:
    tokens = float(run.rows.output_tokens.sum())
    return Missing("the token count of a chunk is unknown") if np.isnan(tokens) else int(tokens)


def _stretch(window: Window) -> dict[str, float]:
    return {
        "start_s": window.start_ns / 1e9,
        "end_s": window.end_ns / 1e9,
        "duration_s": window.seconds,
    }


def _steady(run: RunTables) -> dict[str, Any]:
    """With the requests that finished inside it."""
    window, why_not = run.steady_or_why_not
    if window is None:
        return {"start_s": None, "end_s": None, "duration_s": None, "requests": None, "reason": why_not}
    return _stretch(window) | {"requests": finished_inside(run.rows, window)}


UNKNOWN = {
    "concurrency": "no limit was set",
    "ideal_prefix_hit_ratio": "the block size of the target's cache is unknown",
    "shape": "the target's model is unknown",
}
"""Why a field of the context is null."""


def _context(run: RunTables) -> dict[str, Any]:
    found = {
        name: Missing(UNKNOWN.get(name, "unknown")) if value is None else value
        for name, value in asdict(run.context).items()
    }
    if run.context.token_times:  # as ever, and older records do not say so
        del found["token_times"]
    return found | {"peaks": known_peaks(run)}


def known_peaks(run: RunTables) -> dict[str, Any]:
    """What the device can do at most; `Missing` where it is unknown."""
    known = run.context.peaks
    why = Missing(known.get("note") or "not known of this device")
    reasons = {"note": Missing("there is nothing to note")}
    return {name: reasons.get(name, why) if value is None else value for name, value in known.items()}


def _fact(key: str, label: str, unit: str, definition: str, compute: Any) -> Metric:
    """Stands in the record beside the metrics; in no table of its own."""
    return Metric(("metrics", key), label, unit, None, definition, compute, parts=())


METRICS: tuple[Metric, ...] = (
    _fact("context", "Context", "", "What the tables do not say and the metrics need.", _context),
    _fact("counts", "Requests", "", "Measured requests that were due, by what became of them.", _counts),
    _fact(
        "prompt_tokens",
        "Prompt tokens",
        "tokens",
        "Prompt tokens of the measured requests that were due.",
        lambda run: int(run.rows.prompt_tokens.sum()),
    ),
    _fact(
        "requested_tokens",
        "Requested tokens",
        "tokens",
        "Output tokens that they asked for.",
        lambda run: int(run.rows.requested_tokens.sum()),
    ),
    _fact("output_tokens", "Output tokens", "tokens", "Output tokens that they got.", _output_tokens),
    _fact(
        "whole_run",
        "Whole run",
        "s",
        "From the run's start to its last measured token, or to the interruption.",
        lambda run: _stretch(run.whole),
    ),
    _fact(
        "steady_state",
        "Steady state",
        "s",
        "The stretch in which the batch was full and the ramps at both ends play no part.",
        _steady,
    ),
)
