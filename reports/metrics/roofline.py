"""Bytes and FLOPs a run needed, counted from shapes, over measured and datasheet peaks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from backbench.reports.metrics.steps import plain_decodes, step_times_ns

if TYPE_CHECKING:
    import pandas as pd

    from backbench.reports.metrics.requests import Requests


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
    """Bytes of weights a step reads: every matrix once (the embedding table is a gather)."""
    kv_bytes_per_token: int
    """K and V of all layers."""


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


def section(
    rows: Requests, steps: pd.DataFrame, shape: Mapping[str, Any] | None, peaks: Mapping[str, Any]
) -> dict[str, Any]:
    """Model bandwidth use of the decode steps and model FLOP use of the whole run, each with its parts.

    mbu: (weights + KV read) a plain decode step (`metrics.steps`), over those steps' time and the peak
    bandwidth.
    mfu: FLOPs that the answered tokens need, over the busy time and the peak FLOPs. Both are null where the
    peak is unknown; attained bytes/s and FLOP/s stand beside them.
    """
    if shape is None:
        return {"mbu": None, "mfu": None, "reason": "the model's shape is unknown", "peaks": dict(peaks)}
    decode_bytes, decode_s = _decode_bytes(steps, shape)
    flops = _run_flops(rows, steps, shape)
    measured = steps[steps["end_ns"] > 0]
    busy_s = float(step_times_ns(measured).sum()) / 1e9 if len(measured) else 0.0
    bytes_per_s = decode_bytes / decode_s if decode_s > 0 else None
    flops_per_s = flops / busy_s if busy_s > 0 and flops is not None else None
    return {
        "decode_bytes_per_s": bytes_per_s,
        "flops_per_s": flops_per_s,
        "mbu": _over(bytes_per_s, peaks.get("measured_bytes_per_s"), peaks.get("datasheet_bytes_per_s")),
        "mfu": _over(flops_per_s, peaks.get("measured_flops_per_s"), peaks.get("datasheet_flops_per_s")),
        "peaks": dict(peaks),
    }


def _over(value: float | None, measured: float | None, sheet: float | None) -> dict[str, float | None]:
    return {
        "measured": value / measured if value is not None and measured else None,
        "datasheet": value / sheet if value is not None and sheet else None,
    }


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


def _run_flops(rows: Requests, steps: pd.DataFrame, shape: Mapping[str, Any]) -> float | None:
    """FLOPs the answered requests need: 2 a weight and token, 4 a key, head dimension and query.

    Prompt tokens found in the prefix cache need none of the linear work; recomputation after a
    preemption is not needed work and is left out.
    """
    answered = ~np.isnan(rows.first_ns)
    outputs = rows.output_tokens[answered]
    if np.isnan(outputs).any():
        return None
    prompts = rows.prompt_tokens[answered]
    hits = float(steps.loc[steps["end_ns"] > 0, "prefix_hit_tokens"].sum())
    tokens = float((prompts + outputs - 1).sum()) - hits
    length = prompts + outputs - 1
    keys = 0.0
    for window in shape["windows"]:
        inside = np.minimum(length, np.inf if window is None else window)
        keys += float((inside * (inside + 1) / 2 + (length - inside) * inside).sum())
    attention = 4.0 * shape["q_heads"] * shape["head_dim"] * keys
    return (
        2.0 * shape["linear_parameters"] * tokens
        + 2.0 * shape["head_parameters"] * float(outputs.sum())
        + attention
    )
