"""Linear layers of the Triton backend: skinny kernels where they win, the vendor's library elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from backends.interface import BackendError, Device, Linear, Scheme, Weight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class NormInput:
    """An RMS norm to apply to a linear layer's input."""

    weight: Tensor
    """[K]"""
    eps: float


class TritonLinear(Linear):
    """Dense weights; the packed form is the contiguous [N, K] tensor.

    `run` picks by the measured table of `gemm_choice`. Where `fuses` says so, `run_fused` also norms the
    input, gates and adds a residual in the same launch.
    """

    name = "triton"

    def supports(self, scheme: Scheme, n: int, k: int, dtype: torch.dtype, device: Device) -> list[str]:
        reasons = []
        if device.vendor == "cpu" and not device.interpret:
            reasons.append("needs an NVIDIA or AMD GPU; use --backend torch, or --interpret for correctness")
        if scheme != Scheme():
            reasons.append(f"only dense weights are served, not {scheme.weight}")
        if dtype not in DTYPES:
            reasons.append(f"dtype {dtype} is none of float32, bfloat16, float16")
        return reasons

    def pack(self, weight: Weight, device: Device) -> Tensor:
        n, k = weight.q.shape
        if reasons := self.supports(weight.scheme, n, k, weight.q.dtype, device):
            raise BackendError(f"Triton linear cannot serve this weight: {'; '.join(reasons)}.")
        return weight.q.to(device.torch_device).contiguous()

    def run(self, x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
        from backends.triton.gemm_choice import choose
        from backends.triton.launch import architecture
        from backends.triton.skinny_launch import multiply

        n, k = packed.shape
        config = choose(architecture(x.device), x.shape[0], n, k, x.dtype)
        if config is None or x.shape[0] == 0:
            return functional.linear(x, packed, bias)
        return multiply(x, packed, config, bias)

    def fuses(self, packed: Tensor, rows: int) -> bool:
        """True when `run_fused` gates and adds for `rows` rows of this weight in one launch."""
        from backends.triton.gemm_choice import choose
        from backends.triton.launch import architecture

        n, k = packed.shape
        return rows > 0 and choose(architecture(packed.device), rows, n, k, packed.dtype) is not None

    def run_fused(
        self,
        x: Tensor,
        packed: Tensor,
        bias: Tensor | None = None,
        *,
        norm: NormInput | None = None,
        gate: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor:
        """norm(x) W^T + bias, then silu(first half) * second half where `gate`, plus `residual`.

        x [M, K], packed [N, K], residual [M, N] (N / 2 with `gate`); returns the residual's shape in x's
        dtype. Sums stay in fp32 until the end. `norm` is for a single row.

        Raises:
            BackendError: `fuses` is False for this weight and row count, or `norm` with several rows.
        """
        from backends.triton.gemm_choice import choose
        from backends.triton.launch import architecture
        from backends.triton.skinny_launch import multiply

        n, k = packed.shape
        config = choose(architecture(x.device), x.shape[0], n, k, x.dtype)
        if config is None:
            raise BackendError(f"No fused product for {x.shape[0]} rows by [{n}, {k}]; use run instead.")
        return multiply(x, packed, config, bias, norm=norm, gate=gate, residual=residual)
