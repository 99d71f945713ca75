"""The Triton backend's elementwise operations."""

from __future__ import annotations

import torch
from torch import Tensor

from backbench.backends.interface import (
    AttentionSpec,
    Device,
    Operations,
    Rotation,
    RoundedRows,
    SamplingBatch,
)
from backbench.backends.interface.device import kernels_refused
from backbench.backends.triton.quantized_weight import ROUNDINGS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class TritonOperations(Operations):
    """Fused kernels with fp32 arithmetic; kernels are imported at first use.

    One set serves decode (one token, where latency counts) and prefill (bandwidth): launch shapes follow
    from the number of rows.
    """

    name = "triton"
    roundings = frozenset(ROUNDINGS)

    def refusals(self, dtype: torch.dtype, device: Device) -> list[str]:
        reasons = kernels_refused(device)
        if dtype not in DTYPES:
            reasons.append(f"dtype {dtype} is none of float32, bfloat16, float16")
        return reasons

    def embed(self, ids: Tensor, table: Tensor) -> Tensor:
        from backbench.backends.triton.elementwise import embed

        return embed(ids, table)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        from backbench.backends.triton.elementwise import rms_norm

        return rms_norm(x, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        from backbench.backends.triton.elementwise import rms_norm

        return rms_norm(x, weight, eps, residual), residual

    def rotate(
        self, qkv: Tensor, positions: Tensor, rotation: Rotation, spec: AttentionSpec
    ) -> tuple[Tensor, Tensor, Tensor]:
        from backbench.backends.triton.elementwise import rotate

        return rotate(qkv, positions, rotation, spec)

    def gate(self, gate_up: Tensor) -> Tensor:
        from backbench.backends.triton.elementwise import gate

        return gate(gate_up)

    def rounded_add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, activation: str
    ) -> tuple[RoundedRows, Tensor]:
        from backbench.backends.triton.fused_rounding import rounded_add_rms_norm

        return rounded_add_rms_norm(x, residual, weight, eps, activation), residual

    def rounded_gate(self, gate_up: Tensor, activation: str) -> RoundedRows:
        from backbench.backends.triton.fused_rounding import rounded_gate

        return rounded_gate(gate_up, activation)

    def sample(self, logits: Tensor, sampling: SamplingBatch) -> Tensor:
        from backbench.backends.triton.sampling import sample

        return sample(logits, sampling)
