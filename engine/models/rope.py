"""Rotary position embeddings (Su et al. 2021) and the ways to stretch them to longer contexts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from backbench.backends.interface import Rotary

ROPE_KINDS = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class RopeConfig:
    """A rotary embedding's base and how it is stretched to longer contexts."""

    theta: float = 10_000.0
    kind: str = "default"
    """One of `ROPE_KINDS`."""
    factor: float = 1.0
    original_max_len: int = 0
    """Context length before stretching (llama3, yarn)."""
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    """Multiplies cosines and sines (yarn); None = from `factor`."""
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


def rotary_table(rope: RopeConfig, rotary_dim: int, device: torch.device, max_len: int) -> Rotary:
    """Cosines and sines of positions 0 to max_len - 1, in fp32 as transformers computes them.

    Yarn's attention factor multiplies both, which scales the scores by its square.
    """
    frequencies, scale = inverse_frequencies(rope, rotary_dim)
    angles = torch.arange(max_len, dtype=torch.float32)[:, None] * frequencies
    return Rotary(torch.cat([angles.cos() * scale, angles.sin() * scale], dim=-1).to(device), rotary_dim)


def inverse_frequencies(rope: RopeConfig, rotary_dim: int) -> tuple[Tensor, float]:
    """(radians a position turns each pair by, f32[rotary_dim / 2]; the factor of cosines and sines)."""
    powers = rope.theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)
    frequencies = 1.0 / powers
    if rope.kind == "linear":
        return frequencies / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(rope, frequencies), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, frequencies, rotary_dim), _yarn_attention_factor(rope)
    return frequencies, 1.0


def _llama3(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """Llama 3.1's stretch: long wavelengths by `factor`, short ones not at all, a ramp between.

    Source: apply_scaling in meta-llama/llama-models, models/llama3/model.py.
    """
    wavelength = 2 * math.pi / frequencies
    turns = rope.original_max_len / wavelength
    span = rope.high_frequency_factor - rope.low_frequency_factor
    keep = ((turns - rope.low_frequency_factor) / span).clamp(0, 1)
    return (1 - keep) * frequencies / rope.factor + keep * frequencies


def _yarn(rope: RopeConfig, frequencies: Tensor, rotary_dim: int) -> Tensor:
    """YaRN (Peng et al. 2023, section 3.2): a ramp over dimensions by turns within the original context."""

    def dimension(turns: float) -> float:
        """The (fractional) pair that turns this often within the original context."""
        return (
            rotary_dim * math.log(rope.original_max_len / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
        )

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001  # as transformers does: a ramp of no width divides by zero
    pairs = torch.arange(rotary_dim // 2, dtype=torch.float32)
    stretched = ((pairs - low) / (high - low)).clamp(0, 1)
    return stretched * frequencies / rope.factor + (1 - stretched) * frequencies


def _yarn_attention_factor(rope: RopeConfig) -> float:
    """YaRN section 3.4 (0.1 ln(factor) + 1), with the mscale variants of DeepSeek's configs."""
    if rope.attention_factor is not None:
        return rope.attention_factor

    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)
