"""What a workload is like before anything runs: lengths, arrivals, bursts, prefixes, sessions, clipping."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from backbench.reports.metrics.schedule import dispersion
from backbench.workloads.mix import DIGITS
from backbench.workloads.request import Request, Workload
from backbench.workloads.statistics import (
    answered_tokens,
    arrival_counts,
    gap_cv,
    histogram,
    ideal_prefix_hit_ratio,
    summarise_lengths,
)

BLOCK_TOKENS = 16
"""Of a prefix cache whose block size is not known."""
PACED = "the answers pace the sending"
TOGETHER = "all arrive at one time"


def profile(workload: Workload, block_tokens: int = BLOCK_TOKENS) -> dict[str, Any]:
    """Everything that is drawn of it, as JSON takes it. Lengths in tokens, times in seconds.

    `arrivals`, `sessions`, `clipped` and `parts` are None where there are none; `untimed` then says why.
    """
    requests, parameters = workload.requests, workload.parameters
    arrivals = _arrivals(workload)
    return {
        "name": workload.name,
        "requests": len(requests),
        "content_hash": workload.content_hash,
        "notes": list(workload.notes),
        "parameters": parameters,
        "schedule_s": workload.schedule_s,
        "prompt_tokens": _lengths([len(request.prompt) for request in requests]),
        "output_tokens": _lengths([request.output_tokens for request in requests]),
        "arrivals": arrivals,
        "untimed": None if arrivals else TOGETHER if workload.concurrency is None else PACED,
        "prefix": {
            "block_tokens": block_tokens,
            "ideal_hit_ratio": ideal_prefix_hit_ratio(
                (request.prompt for request in requests), block_tokens, answered_tokens(requests)
            ),
        },
        "sessions": _sessions(requests),
        "clipped": _clipped(parameters.get("transformations", [])),
        "parts": _parts(parameters.get("source", {}), requests),
    }


def _lengths(lengths: Sequence[int]) -> dict[str, Any]:
    return asdict(summarise_lengths(lengths)) | {"total": sum(lengths), "histogram": histogram(lengths)}


def _arrivals(workload: Workload) -> dict[str, Any] | None:
    """Rate, bursts and counts over time; None where no times are prescribed.

    Turns that are sent a think time after an answer are left out: the answers time them.
    """
    times_ns = [each.arrival_ns for each in workload.requests if each.follows is None or each.arrival_ns]
    if max(times_ns, default=0) == min(times_ns, default=0):
        return None
    ordered = np.sort(np.asarray(times_ns, dtype=np.float64))
    span_s = (ordered[-1] - ordered[0]) / 1e9
    bin_s, counts = arrival_counts(times_ns)
    return {
        "requests_per_s": (len(ordered) - 1) / span_s if span_s else None,
        "gap_cv": gap_cv(times_ns),
        "index_of_dispersion": dispersion(ordered),
        "longest_gap_s": float(np.diff(ordered).max()) / 1e9,
        "bin_s": bin_s,
        "counts": counts,
    }


def _sessions(requests: Sequence[Request]) -> dict[str, Any] | None:
    turns = Counter(request.session for request in requests if request.session is not None)
    if not turns:
        return None
    return {"sessions": len(turns), "turns": asdict(summarise_lengths(list(turns.values())))}


def _clipped(transformations: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    return next((each for each in transformations if each["kind"] == "clip" and each["requests"]), None)


def _parts(source: dict[str, Any], requests: Sequence[Request]) -> list[dict[str, Any]] | None:
    """A mix's parts: how many requests, and how long."""
    if source.get("kind") != "mix":
        return None
    found = []
    for place, part in enumerate(source["parts"]):
        own = [each for each, of in zip(requests, source["part_of"], strict=True) if of == DIGITS[place]]
        prompts, outputs = [len(each.prompt) for each in own], [each.output_tokens for each in own]
        found.append(
            {
                "name": part["name"],
                "weight": part["weight"],
                "requests": len(own),
                "prompt_tokens": asdict(summarise_lengths(prompts)) if own else None,
                "output_tokens": asdict(summarise_lengths(outputs)) if own else None,
            }
        )
    return found
