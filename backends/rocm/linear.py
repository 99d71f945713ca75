"""Dense products on AMD GPUs: AITER's tuned choice where it is installed, else the Triton backend's.

AITER's function looks its tuned table up by shape and falls to hipBLASLt, which torch calls as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from backbench.backends.interface import Crossover, Device, Linear, RoundedRows, Weight, WeightSpec
from backbench.backends.rocm import aiter
from backbench.backends.triton.linear import TritonLinear
from backbench.errors import BackendError

KEYWORDS = ("A", "B", "bias")


@dataclass(frozen=True)
class PackedLinear:
    """A weight and what multiplies by it."""

    weight: Any
    product: Any
    """AITER's function; None = the Triton backend's linear."""


class RocmLinear(Linear):
    """Dense weights in bf16 or fp16 (AITER), or whatever the Triton backend serves."""

    name = "rocm"

    def __init__(self) -> None:
        self.other = TritonLinear()

    def refusals(self, spec: WeightSpec, device: Device) -> list[str]:
        if device.vendor != "amd":
            return [f"needs an AMD GPU, this is {device.name}"]
        return self.other.refusals(spec, device)

    def pack(self, weight: Weight, device: Device) -> PackedLinear:
        spec = weight.spec("packed", torch.bfloat16 if weight.scheme.quantized else None)
        if reasons := self.refusals(spec, device):
            raise BackendError(f"rocm linear cannot serve this weight: {'; '.join(reasons)}.")
        served = weight.scheme.dense and weight.q.dtype in (torch.bfloat16, torch.float16)
        if aiter.absent(device) or not served:
            return PackedLinear(self.other.pack(weight, device), None)
        product = aiter.AITER.function("aiter.tuned_gemm", "gemm_a16w16", KEYWORDS)
        return PackedLinear(weight.q.to(device.torch_device).contiguous(), product)

    def unpack(self, packed: PackedLinear) -> Weight | None:
        return self.other.unpack(packed.weight) if packed.product is None else None

    def served_by(self, spec: WeightSpec, device: Device) -> str:
        return self.name if spec.scheme.dense else self.other.served_by(spec, device)

    def crossover(self, spec: WeightSpec, device: Device) -> Crossover | None:
        return self.other.crossover(spec, device)

    def run(self, x: Tensor, packed: PackedLinear, bias: Tensor | None = None) -> Tensor:
        if packed.product is None:
            return self.other.run(x, packed.weight, bias)
        result: Tensor = packed.product(A=x, B=packed.weight, bias=bias)
        return result

    def rounding(self, packed: PackedLinear) -> str | None:
        return self.other.rounding(packed.weight) if packed.product is None else None

    def run_rounded(self, rows: RoundedRows, packed: PackedLinear, bias: Tensor | None = None) -> Tensor:
        return self.other.run_rounded(rows, packed.weight, bias)
