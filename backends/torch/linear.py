"""Dense linear layers through torch's own matrix multiplication (oneDNN, cuBLAS or hipBLASLt)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from backbench.backends.interface import Device, Linear, Scheme, Weight, WeightSpec
from backbench.errors import BackendError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class TorchLinear(Linear):
    """Dense weights in the model's dtype; the packed form is the contiguous [N, K] tensor."""

    name = "torch"

    def refusals(self, spec: WeightSpec, device: Device) -> list[str]:
        reasons = []
        if spec.scheme != Scheme():
            reasons.append(f"only dense weights are served, not {spec.scheme}")
        if spec.dtype not in DTYPES:
            reasons.append(f"dtype {spec.dtype} is none of float32, bfloat16, float16")
        return reasons

    def pack(self, weight: Weight, device: Device) -> Tensor:
        if reasons := self.refusals(weight.spec("packed"), device):
            raise BackendError(f"{self.name} linear cannot serve this weight: {'; '.join(reasons)}.")
        return weight.q.to(device.torch_device).contiguous()

    def run(self, x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
        return functional.linear(x, packed, bias)
