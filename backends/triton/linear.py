"""Linear layers of the Triton backend: skinny kernels where they win, the vendor's library elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from backbench.backends.interface import Device, WeightSpec
from backbench.backends.interface.device import kernels_refused
from backbench.backends.torch.linear import TorchLinear
from backbench.backends.triton import configs
from backbench.backends.triton.configs import GemmConfig, Product, ZeroBias


class TritonLinear(TorchLinear):
    """Dense weights, packed as torch's are: the [N, K] tensor.

    `run` picks by `configs.choose`. Norm, gate and residual stay launches of their own:
    with overlapped launches, folding them into the products gained nothing (see `benchmarks/layers.py`).
    """

    name = "triton"

    def __init__(self) -> None:
        self._zeros: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    def refusals(self, spec: WeightSpec, device: Device) -> list[str]:
        dense = [] if spec.scheme.dense else ["only dense weights are served"]
        return kernels_refused(device) + dense + super().refusals(spec, device)

    def run(self, x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
        from backbench.backends.triton.launch import place_of

        n, k = packed.shape
        arch, units, _ = place_of(x.device)
        return self.product(x, packed, configs.choose(arch, units, x.shape[0], n, k, x.dtype), bias)

    def product(self, x: Tensor, weight: Tensor, way: Product | None, bias: Tensor | None = None) -> Tensor:
        """x [M, K] by weight [N, K] transposed in the given way; None = the library, plainly."""
        if isinstance(way, GemmConfig) and x.shape[0] > 0:
            from backbench.backends.triton.gemm import multiply

            return multiply(x, weight, way, bias)
        if isinstance(way, ZeroBias) and bias is None:
            bias = self._zero_bias(weight.shape[0], x)
        return functional.linear(x, weight, bias)

    def _zero_bias(self, n: int, x: Tensor) -> Tensor:
        """Zeros [n], made once; see `configs.ZeroBias`."""
        key = (n, x.dtype, x.device)
        if key not in self._zeros:
            self._zeros[key] = torch.zeros(n, dtype=x.dtype, device=x.device)
        return self._zeros[key]

    def tuning(self, spec: WeightSpec, device: Device) -> dict[str, str | None] | None:
        if device.vendor == "cpu":
            return None
        return configs.product_tuning(device.arch, device.units, spec.n, spec.k, spec.dtype)
