"""How the engine's steps spent the run: busy time, the host's share, preemptions, prefix hits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from backbench.reports.metrics.metric import Metric, Missing, Part
from backbench.reports.metrics.run import RunTables

NO_STEPS = Missing("the target told of no steps")


@dataclass(frozen=True)
class TimeShares:
    """Shares of the steps' time by what they held, the host's share, and the share of steps from a graph."""

    decode_only: float
    mixed: float
    prefill_only: float
    host: float
    graph: float


def time_shares(run: RunTables) -> TimeShares | None:
    """Where the time of the measured steps went; None without any."""
    times, steps = run.step_times_ns, run.measured_steps
    busy = times.sum()
    if not busy:
        return None
    prefill = steps["num_prefill_tokens"].to_numpy() > 0
    decode = steps["num_decodes"].to_numpy() > 0
    return TimeShares(
        float(times[decode & ~prefill].sum() / busy),
        float(times[decode & prefill].sum() / busy),
        float(times[prefill & ~decode].sum() / busy),
        host_share(run),
        float(steps["graph"].mean()),
    )


def host_share(run: RunTables) -> float:
    """A step's host time counts up to what the step itself took: the rest lies behind another step."""
    host = run.measured_steps["host_ns"].to_numpy(dtype=np.float64)
    return float(np.minimum(host, run.step_times_ns).sum() / run.step_times_ns.sum())


def _prefill_rate(run: RunTables) -> float | Missing:
    """Of steps that began in the run: one that began before it has only part of its time in it."""
    steps = run.measured_steps
    tokens = steps["num_prefill_tokens"].to_numpy(dtype=np.float64)
    prompts = (tokens > 0) & (steps["start_ns"] >= 0).to_numpy(bool)
    busy_s = float(run.step_times_ns[prompts].sum()) / 1e9
    return float(tokens[prompts].sum()) / busy_s if busy_s else Missing("no step computed a prompt")


def _kv_share(run: RunTables) -> float | Missing:
    steps = run.measured_steps
    if not (steps["kv_blocks_total"] > 0).all():
        return Missing("the size of the KV pool is unknown")
    return float((steps["kv_blocks_used"] / steps["kv_blocks_total"]).max())


def realised_hit_ratio(run: RunTables) -> float | Missing:
    """Prompt tokens found in the prefix cache, over those found or computed."""
    hits = _hits(run)
    asked = hits + int(run.measured_steps["num_prefill_tokens"].sum())
    return hits / asked if asked else Missing("no prompt token was scheduled")


def _hits(run: RunTables) -> int:
    return int(run.measured_steps["prefix_hit_tokens"].sum())


def ideal_hit_ratio(run: RunTables) -> float | Missing:
    """What a cache of unlimited size would have found."""
    ratio = run.context.ideal_prefix_hit_ratio
    return Missing("the block size of the target's cache is unknown") if ratio is None else ratio


def _step(
    key: str,
    label: str,
    unit: str,
    definition: str,
    compute: Callable[[RunTables], Any],
    better: bool | None = None,
    **more: Any,
) -> Metric:
    def value(run: RunTables) -> Any:
        return NO_STEPS if run.measured_steps.empty else compute(run)

    found: dict[str, Any] = {"group": "Steps"} | more
    return Metric(("metrics", "steps", key), label, unit, better, definition, value, **found)


METRICS: tuple[Metric, ...] = (
    Metric(
        ("metrics", "prefix_cache", "ideal"),
        "Prefix hit ratio, ideal",
        "ratio",
        None,
        "Share of the prompt tokens that a cache of unlimited size would hold, in whole blocks.",
        ideal_hit_ratio,
        "Prefix cache",
    ),
    Metric(
        ("metrics", "prefix_cache", "realised"),
        "Prefix hit ratio, realised",
        "ratio",
        True,
        "Prompt tokens found in the cache when a request is first admitted, over those found or computed.",
        realised_hit_ratio,
        "Prefix cache",
        parts=(Part(summary=True),),
    ),
    Metric(
        ("metrics", "prefix_cache", "hit_tokens"),
        "Prefix hit tokens",
        "tokens",
        None,
        "Prompt tokens found in the cache when a request is first admitted.",
        _hits,
        parts=(),
    ),
    Metric(
        ("metrics", "steps", "count"),
        "Steps",
        "",
        None,
        "Steps that ended after the run's start.",
        lambda run: len(run.measured_steps),
        parts=(),
    ),
    _step(
        "busy_s",
        "Time in steps",
        "s",
        "Time inside the whole run in which a step was under way.",
        lambda run: run.busy_s,
        parts=(),
        since=2,
    ),
    _step(
        "host_share",
        "Host's share of step time",
        "ratio",
        "Time of the host in the steps, each at most the step's own, over the time in steps.",
        lambda run: host_share(run) if run.busy_s else Missing("the steps took no time"),
        better=False,
        since=2,
    ),
    _step(
        "prefill_tokens_per_s",
        "Prefill (input) tok/s, steps with prompts",
        "tok/s",
        "Prompt tokens computed, over the time in the steps that computed any, their decodes included.",
        _prefill_rate,
        better=True,
        parts=(Part(summary=True),),
        since=2,
    ),
    _step(
        "mean_s",
        "Step, mean",
        "s",
        "Time in steps over the number of steps.",
        lambda run: run.busy_s / len(run.measured_steps),
        better=False,
        since=2,
    ),
    _step(
        "mean_seqs",
        "Sequences in a step, mean",
        "",
        "Sequences that a step computed.",
        lambda run: float(run.measured_steps["num_seqs"].mean()),
    ),
    _step(
        "graph_share",
        "Steps from a graph",
        "ratio",
        "Share of the steps that a captured graph ran.",
        lambda run: float(run.measured_steps["graph"].mean()),
    ),
    _step(
        "preemptions",
        "Preemptions",
        "",
        "Sequences that gave their blocks up to others and were computed again.",
        lambda run: int(run.measured_steps["preemptions"].sum()),
        better=False,
        parts=(Part(summary=True),),
    ),
    _step(
        "peak_running",
        "Running requests, peak",
        "",
        "Most sequences that ran at once.",
        lambda run: int(run.measured_steps["running"].max()),
        parts=(),
    ),
    _step(
        "peak_waiting",
        "Waiting requests, peak",
        "",
        "Most sequences that waited in the engine at once.",
        lambda run: int(run.measured_steps["waiting"].max()),
        parts=(),
    ),
    _step(
        "peak_kv_share",
        "KV pool in use, peak",
        "ratio",
        "Largest share of the pool's blocks in use after a step.",
        _kv_share,
    ),
)
