"""Linear layers of the Triton backend: skinny kernels where they win, the vendor's library elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from backends.interface import BackendError, Device, Linear, Scheme, Weight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class TritonLinear(Linear):
    """Dense weights; the packed form is the contiguous [N, K] tensor.

    `run` picks by `gemm_choice`. Norm, gate and residual stay launches of their own:
    with overlapped launches, folding them into the products gained nothing (see `benchmarks/layers.py`).
    """

    name = "triton"

    def __init__(self) -> None:
        self._zeros: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

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
        from backends.triton.gemm_choice import GemmConfig, ZeroBias, choose
        from backends.triton.launch import architecture, compute_units
        from backends.triton.skinny_launch import multiply

        n, k = packed.shape
        launch = choose(architecture(x.device), compute_units(x.device), x.shape[0], n, k, x.dtype)
        if isinstance(launch, GemmConfig) and x.shape[0] > 0:
            return multiply(x, packed, launch, bias)
        if isinstance(launch, ZeroBias) and bias is None:
            bias = self._zero_bias(n, x)
        return functional.linear(x, packed, bias)

    def _zero_bias(self, n: int, x: Tensor) -> Tensor:
        """Zeros [n], made once; see `gemm_choice.ZeroBias`."""
        key = (n, x.dtype, x.device)
        if key not in self._zeros:
            self._zeros[key] = torch.zeros(n, dtype=x.dtype, device=x.device)
        return self._zeros[key]

    def tuning(self, n: int, k: int, dtype: torch.dtype, device: Device) -> dict[str, str | None] | None:
        from backends.triton import gemm_choice

        return None if device.vendor == "cpu" else gemm_choice.tuning(device.arch, device.units, n, k, dtype)
