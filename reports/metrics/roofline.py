"""Bytes and FLOPs a run needed, counted from shapes, over measured and datasheet peaks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from backbench.reports.metrics.metric import Metric, Missing, Part
from backbench.reports.metrics.outcome import known_peaks
from backbench.reports.metrics.run import RunTables
from backbench.reports.metrics.steps import plain_decodes, step_times_ns

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class ModelShape:
    """The facts of a decoder that decide its bytes and FLOPs."""

    windows: list[int | None]
    """Per layer: the latest keys a query sees; None = all."""
    q_heads: int
    head_dim: int
    linear_parameters: int
    """Weights of the layers' matrix multiplications."""
    head_parameters: int
    """Weights of the output projection, applied to one position a sequence and step."""
    weight_bytes_per_step: int
    """Bytes of weights a step reads, as they are stored: every matrix once (the embedding is a gather)."""
    kv_bytes_per_token: int
    """K and V of all layers, with the scales of an int8 cache."""
    rounded_rows: str | None = None
    """How rows are rounded before they are multiplied; None = not at all."""


@dataclass(frozen=True)
class Peaks:
    """What the device can do at most; None = unknown."""

    measured_bytes_per_s: float | None = None
    """Read + write of a large device copy."""
    measured_flops_per_s: float | None = None
    """Dense matrix multiplication in the run's dtype."""
    datasheet_bytes_per_s: float | None = None
    datasheet_flops_per_s: float | None = None
    note: str | None = None


def section(run: RunTables) -> dict[str, Any]:
    """Model bandwidth use of the decode steps and model FLOP use of the whole run, each with its parts.

    mbu: (weights + KV read) a plain decode step (`metrics.steps`), over those steps' time and the peak
    bandwidth.
    mfu: FLOPs that the tokens made in the whole run need, over the busy time and the peak FLOPs. Both are
    `Missing` where the peak is unknown; attained bytes/s and FLOP/s stand beside them.
    """
    shape, peaks = run.context.shape, run.context.peaks
    if shape is None:
        why = Missing("the model's shape is unknown")
        return {"decode_bytes_per_s": why, "flops_per_s": why, "mbu": why, "mfu": why}
    decode_bytes, decode_s = _decode_bytes(run.steps, shape)
    flops = run_flops(run, shape)
    bytes_per_s: Rate = decode_bytes / decode_s if decode_s > 0 else Missing("no step only decoded")
    flops_per_s: Rate = Missing("the token count of a chunk is unknown")
    if not np.isnan(flops):
        flops_per_s = flops / run.busy_s if run.busy_s > 0 else Missing("the target told of no steps")
    return {
        "decode_bytes_per_s": bytes_per_s,
        "flops_per_s": flops_per_s,
        "mbu": _over(bytes_per_s, peaks, "bytes_per_s"),
        "mfu": _over(_in_the_peaks_dtype(flops_per_s, shape), peaks, "flops_per_s"),
    }


Rate = float | Missing


def _in_the_peaks_dtype(flops_per_s: Rate, shape: Mapping[str, Any]) -> Rate:
    """The peaks are of the run's dtype: where rows are rounded to another one, they say nothing."""
    rounded = shape.get("rounded_rows")
    return Missing(f"the peak of {rounded} products is not measured") if rounded else flops_per_s


def _over(value: Rate, peaks: Mapping[str, Any], unit: str) -> dict[str, Rate]:
    def ratio(kind: str) -> Rate:
        peak = peaks.get(f"{kind}_{unit}")
        if isinstance(value, Missing):
            return value
        return value / peak if peak else Missing(f"the {kind} peak of this device is unknown")

    return {kind: ratio(kind) for kind in ("measured", "datasheet")}


def _decode_bytes(steps: pd.DataFrame, shape: Mapping[str, Any]) -> tuple[float, float]:
    """Bytes the plain decode steps must move, and their seconds."""
    chosen = plain_decodes(steps)
    seconds = float(step_times_ns(steps)[chosen].sum()) / 1e9
    context = steps["context_tokens"].to_numpy(np.float64)[chosen]
    seqs = steps["num_seqs"].to_numpy(np.float64)[chosen]
    # Only sums over sequences are kept, so a window's keys are bounded by window * sequences.
    keys = [context if window is None else np.minimum(context, window * seqs) for window in shape["windows"]]
    read = float(np.mean(keys, axis=0).sum()) * shape["kv_bytes_per_token"] if len(context) else 0.0
    return float(chosen.sum() * shape["weight_bytes_per_step"] + read), seconds


def run_flops(run: RunTables, shape: Mapping[str, Any]) -> float:
    """FLOPs that the tokens seen inside the whole run need: 2 a weight and token, 4 a key, head dimension
    and query; NaN where a chunk's token count is unknown.

    A request whose first token lies inside needs its prompt; each further output token inside one position
    more. Handed-over warm-up requests count likewise: their tokens took the run's time. Prompt tokens found
    in the prefix cache need none of the linear work; recomputation after a preemption is not needed work
    and is left out.
    """
    linear = outputs = keys = 0.0
    rows = run.everyone
    for prompt, times, counts in zip(rows.prompt_tokens, rows.chunk_ns, rows.chunk_tokens, strict=True):
        made = float(counts[run.whole.holds(times)].sum())
        if not made:
            continue
        before = float(counts[times <= run.whole.start_ns].sum())
        first = prompt + before - 1 if before else 0.0
        last = prompt + before + made - 1
        linear += last - first
        outputs += made
        keys += sum(_keys(last, window) - _keys(first, window) for window in shape["windows"])
    hits = float(run.measured_steps["prefix_hit_tokens"].sum())
    attention = 4.0 * shape["q_heads"] * shape["head_dim"] * keys
    return (
        2.0 * shape["linear_parameters"] * (linear - hits)
        + 2.0 * shape["head_parameters"] * outputs
        + attention
    )


def _keys(length: float, window: int | None) -> float:
    """Keys that the first `length` positions see in all."""
    inside = length if window is None else min(length, window)
    return inside * (inside + 1) / 2 + (length - inside) * inside


def _roofline(key: str, label: str, unit: str, definition: str, *parts: Part, since: int = 1) -> Metric:
    def value(run: RunTables) -> Any:
        return section(run)[key]

    path = ("roofline", key)
    return Metric(path, label, unit, True, definition, value, "Roofline", parts=parts, since=since)


METRICS: tuple[Metric, ...] = (
    _roofline(
        "mbu",
        "Memory bandwidth used (MBU)",
        "ratio",
        "Bytes of weights and KV that the decode-only steps need, over their time and the peak bandwidth.",
        Part(headline=True),
    ),
    _roofline(
        "mfu",
        "FLOPs used (MFU)",
        "ratio",
        "FLOPs that the tokens made in the whole run need, over the time in steps and the peak FLOPs.",
        Part(headline=True),
        since=2,
    ),
    _roofline("decode_bytes_per_s", "Bytes/s of decode steps", "B/s", "What MBU sets against the peak."),
    _roofline("flops_per_s", "FLOP/s", "FLOP/s", "What MFU sets against the peak.", since=2),
    Metric(
        ("roofline", "peaks"),
        "Peaks",
        "",
        None,
        "What the device can do at most, measured and by its data sheet.",
        known_peaks,
        parts=(),
    ),
)
