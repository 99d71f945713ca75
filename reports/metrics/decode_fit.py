"""Step time of pure decodes as a line in context tokens: separates engine from kernel without a profiler.

    step time = intercept + slope * context tokens

The intercept is the weights and the host; the slope is reading the KV cache.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from backbench.reports.metrics.steps import plain_decodes, step_times_ns

if TYPE_CHECKING:
    import pandas as pd

MIN_STEPS = 16


def floors(shape: Mapping[str, Any] | None, peaks: Mapping[str, Any]) -> dict[str, float | None]:
    """The physical floors: bytes over measured memory bandwidth; None where either is unknown."""
    bandwidth = peaks.get("measured_bytes_per_s")
    if shape is None or not bandwidth:
        return {"intercept_floor_s": None, "slope_floor_s_per_token": None}
    return {
        "intercept_floor_s": shape["weight_bytes_per_step"] / bandwidth,
        "slope_floor_s_per_token": shape["kv_bytes_per_token"] / bandwidth,
    }


def fit(steps: pd.DataFrame, floor: Mapping[str, float | None]) -> dict[str, Any]:
    """Ordinary least squares over the plain decode steps, with standard errors and R^2.

    `reason` says why there is no fit: fewer than 16 such steps, or all with the same context.
    """
    chosen = plain_decodes(steps)
    seconds = step_times_ns(steps)[chosen] / 1e9
    tokens = steps["context_tokens"].to_numpy(dtype=np.float64)[chosen]
    empty = {
        "intercept_s": None,
        "slope_s_per_token": None,
        "intercept_se_s": None,
        "slope_se_s_per_token": None,
        "r_squared": None,
        "steps": len(seconds),
        **floor,
    }
    if len(seconds) < MIN_STEPS:
        return empty | {"reason": f"{len(seconds)} plain decode steps, {MIN_STEPS} needed"}
    centred = tokens - tokens.mean()
    spread = float(centred @ centred)
    if spread == 0:
        return empty | {"reason": "every decode step had the same context"}
    slope = float(centred @ seconds) / spread
    intercept = float(seconds.mean()) - slope * float(tokens.mean())
    residual = seconds - intercept - slope * tokens
    total = float(((seconds - seconds.mean()) ** 2).sum())
    variance = float(residual @ residual) / (len(seconds) - 2)
    return empty | {
        "intercept_s": intercept,
        "slope_s_per_token": slope,
        "intercept_se_s": math.sqrt(variance * (1 / len(seconds) + float(tokens.mean()) ** 2 / spread)),
        "slope_se_s_per_token": math.sqrt(variance / spread),
        "r_squared": 1 - float(residual @ residual) / total if total else None,
    }
