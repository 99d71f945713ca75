"""Dense linear layers through torch's own matrix multiplication (oneDNN, cuBLAS or hipBLASLt)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from backbench.backends.interface import Device, Linear, Scheme, Weight
from backbench.errors import BackendError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class TorchLinear(Linear):
    """Dense weights in the model's dtype; the packed form is the contiguous [N, K] tensor."""

    name = "torch"

    def supports(self, scheme: Scheme, n: int, k: int, dtype: torch.dtype, device: Device) -> list[str]:
        reasons = []
        if scheme != Scheme():
            reasons.append(f"only dense weights are served, not {scheme}")
        if dtype not in DTYPES:
            reasons.append(f"dtype {dtype} is none of float32, bfloat16, float16")
        return reasons

    def pack(self, weight: Weight, device: Device) -> Tensor:
        n, k = weight.q.shape
        if reasons := self.supports(weight.scheme, n, k, weight.q.dtype, device):
            raise BackendError(f"{self.name} linear cannot serve this weight: {'; '.join(reasons)}.")
        return weight.q.to(device.torch_device).contiguous()

    def run(self, x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
        return functional.linear(x, packed, bias)
