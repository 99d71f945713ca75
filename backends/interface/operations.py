"""Elementwise operations and sampling, and what a set of them must offer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from backbench.backends.interface.attention import AttentionSpec, Rotation
from backbench.backends.interface.device import Device
from backbench.backends.interface.linear import RoundedRows


@dataclass
class SamplingBatch:
    """Per-row sampling parameters on the device, and the host flags that decide which kernels run."""

    temperature: Tensor
    """f32[S]; 0 = greedy."""
    top_k: Tensor
    """i32[S]; 0 = off."""
    top_p: Tensor
    """f32[S]; 1 = off."""
    min_p: Tensor
    """f32[S]; 0 = off."""
    noise_key: Tensor
    """i64[S]: the 32-bit key of this row's draw, from `backends.noise.noise_key(seed, draw index)`."""
    all_greedy: bool = True
    any_filter: bool = False
    """True when any row uses top-k, top-p or min-p."""


class Operations(ABC):
    """A named set of elementwise operations. The torch set is the reference for each."""

    name: str
    roundings: frozenset[str] = frozenset()
    """Activations (`quantization.ACTIVATIONS`) in whose codes the `rounded_` methods can leave their rows."""

    @abstractmethod
    def refusals(self, dtype: torch.dtype, device: Device) -> list[str]:
        """Reasons this set cannot run; empty = it can."""

    def tuning(self, dtype: torch.dtype, device: Device) -> dict[str, str | None] | None:
        """Shape -> why it runs on a written default, as `Attention.tuning`."""
        return None

    @abstractmethod
    def embed(self, ids: Tensor, table: Tensor) -> Tensor:
        """Rows `ids` i64[T] of `table` [V, H]: [T, H]."""

    @abstractmethod
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [T, H] / sqrt(mean(x^2) + eps) * weight, in fp32, back in x's dtype (Zhang & Sennrich 2019)."""

    @abstractmethod
    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(rms_norm(x + residual), x + residual); `residual` may be overwritten and returned."""

    @abstractmethod
    def rotate(
        self, qkv: Tensor, positions: Tensor, rotation: Rotation, spec: AttentionSpec
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Split qkv [T, (q + 2 kv) * d], norm each head of q and k where the layer does, rotate both.

        positions: i64[T]. Returns q [T, q_heads, d], k and v [T, kv_heads, d].
        """

    @abstractmethod
    def gate(self, gate_up: Tensor) -> Tensor:
        """silu(gate_up[:, :F]) * gate_up[:, F:] of gate_up [T, 2F]: [T, F] (Shazeer 2020, SwiGLU)."""

    def rounded_add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, activation: str
    ) -> tuple[RoundedRows, Tensor]:
        """`add_rms_norm` with the norm rounded as one of `roundings`."""
        raise NotImplementedError(f"{self.name} operations round nothing.")

    def rounded_gate(self, gate_up: Tensor, activation: str) -> RoundedRows:
        """`gate` rounded as one of `roundings`."""
        raise NotImplementedError(f"{self.name} operations round nothing.")

    @abstractmethod
    def sample(self, logits: Tensor, sampling: SamplingBatch) -> Tensor:
        """One token id i64[S] per row of logits [S, V].

        Greedy rows take the first maximum. Others divide by the temperature, drop what
        top-k, then top-p, then min-p exclude (ties with the threshold stay), and take the argmax of
        logit + Gumbel noise of (noise_key, token), which is an exact draw from the softmax.
        """
