"""How wrong a result may be: measured against the oracle, and against torch's own error in the same dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from backbench.backends.quantization import INT8_KV_MAX

TORCH_FACTOR = 2.0
"""A backend's error may be at most this multiple of torch's in the same dtype, plus one rounding."""
CEILING_ROUNDINGS = 8.0
"""Nothing, torch included, may be off by more than this many roundings of the largest output."""
FP32_ROUNDINGS = 64.0
"""fp32 sums of some hundred terms and fast exponentials: one "rounding" counts as this many units."""


@dataclass(frozen=True)
class Deviation:
    """Distance of a result from the oracle; infinite where a value is not finite."""

    largest: float
    """Largest absolute difference."""
    rms: float
    """Root mean square of the differences."""


def deviation(actual: Tensor, oracle: Tensor) -> Deviation:
    """Compare `actual` (any dtype and device) with the f64 oracle of the same shape."""
    if actual.shape != oracle.shape:
        return Deviation(float("inf"), float("inf"))
    difference = (actual.detach().cpu().double() - oracle.cpu().double()).abs()
    if difference.numel() == 0:
        return Deviation(0.0, 0.0)
    difference = torch.nan_to_num(difference, nan=float("inf"))
    return Deviation(float(difference.max()), float(difference.square().mean().sqrt()))


def rounding(dtype: torch.dtype) -> float:
    """Relative size of one rounding to `dtype`: half a unit in the last place.

    That of an int8 cache is half a step, relative to its head's largest number.
    """
    if dtype == torch.int8:
        return 0.5 / INT8_KV_MAX
    unit = torch.finfo(dtype).eps / 2
    return unit * FP32_ROUNDINGS if dtype == torch.float32 else unit


def limit(reference: Deviation, oracle: Tensor, dtype: torch.dtype) -> Deviation:
    """What a result may be off by, given torch's own deviation in the same dtype.

    Twice torch's plus one rounding of the largest (for the RMS: typical) output, and never more than
    eight roundings, so that torch itself is held to something.
    """
    unit = rounding(dtype)
    largest, typical = float(oracle.abs().max()), float(oracle.square().mean().sqrt())
    return Deviation(
        min(TORCH_FACTOR * reference.largest + unit * largest, CEILING_ROUNDINGS * unit * largest),
        min(TORCH_FACTOR * reference.rms + unit * typical, CEILING_ROUNDINGS * unit * typical),
    )


def complaint(actual: Deviation, allowed: Deviation) -> str:
    """What is wrong, in words; empty when within the limit."""
    if actual.largest > allowed.largest:
        return f"largest error {actual.largest:.3e}, at most {allowed.largest:.3e}"
    if actual.rms > allowed.rms:
        return f"RMS error {actual.rms:.3e}, at most {allowed.rms:.3e}"
    return ""
