"""Linear layers of the Triton backend: skinny kernels where they win, the vendor's library elsewhere."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from backbench.backends import quantization
from backbench.backends.interface import Crossover, Device, RoundedRows, Scheme, Weight, WeightSpec
from backbench.backends.interface.device import kernels_refused
from backbench.backends.interface.weight import PACKED
from backbench.backends.torch.linear import DTYPES, TorchLinear
from backbench.backends.triton import configs, quantized_configs
from backbench.backends.triton.configs import GemmConfig, Product, ZeroBias
from backbench.backends.triton.quantized_weight import (
    NATIVE_ACTIVATIONS,
    ROUNDINGS,
    QuantizedWeight,
    pack_weight,
    unpack_weight,
)
from backbench.backends.triton.sparse_weight import SparseWeight, pack_sparse, sparse_refused, unpack_sparse
from backbench.backends.tuning import table
from backbench.errors import BackendError

Packed = Tensor | QuantizedWeight | SparseWeight
LARGEST_ROW = 32768
"""Input features that a program rounds at once."""


class TritonLinear(TorchLinear):
    """Dense weights, packed as torch's are: the [N, K] tensor; quantized ones as `QuantizedWeight`,
    compressed ones as `SparseWeight`.

    `run` picks by `configs.choose` and `quantized_configs.choose`. Norm, gate and residual stay launches of
    their own: with overlapped launches, folding them into the products gained nothing (see
    `benchmarks/layers.py`).
    """

    name = "triton"

    def __init__(self) -> None:
        self._zeros: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    def refusals(self, spec: WeightSpec, device: Device) -> list[str]:
        reasons = kernels_refused(device)
        if spec.scheme.dense:
            plain = spec if spec.scheme == Scheme() else replace(spec, scheme=Scheme())
            return reasons + super().refusals(plain, device)
        if spec.dtype not in DTYPES:
            reasons.append(f"dtype {spec.dtype} is none of float32, bfloat16, float16")
        return reasons + scheme_refused(spec.scheme, spec.n, spec.k, device.arch)

    def pack(self, weight: Weight, device: Device) -> Any:
        spec = weight.spec("packed", torch.bfloat16 if weight.scheme.quantized else None)
        if reasons := self.refusals(spec, device):
            raise BackendError(f"{self.name} linear cannot serve this weight: {'; '.join(reasons)}.")
        if weight.scheme.compressed:
            return self._pack_sparse(weight, device)
        if not weight.scheme.dense:
            return pack_weight(weight, device.torch_device)
        return weight.q.to(device.torch_device).contiguous()

    def _pack_sparse(self, weight: Weight, device: Device) -> SparseWeight:
        packed, at = pack_sparse(weight, device.torch_device), (device.arch, device.units)
        library = quantized_configs.kept_library(*at, weight.n, weight.k, weight.q.dtype)
        if library is None:
            return packed
        from backbench.backends.triton.sparse import with_library

        return with_library(packed, library)

    def unpack(self, packed: Packed) -> Weight | None:
        if isinstance(packed, SparseWeight):
            return unpack_sparse(packed)
        return unpack_weight(packed) if isinstance(packed, QuantizedWeight) else None

    def served_by(self, spec: WeightSpec, device: Device) -> str:
        if spec.scheme.dense or device.vendor == "cpu":
            return self.name
        ways = _ways(spec, device)
        runs = [(way, max(sizes)) for way, sizes in itertools.groupby(ways, key=ways.__getitem__)]
        return f"{self.name}, " + "; ".join(f"{way} to {size} rows" for way, size in runs)

    def crossover(self, spec: WeightSpec, device: Device) -> Crossover | None:
        if spec.scheme.dense or device.vendor == "cpu":
            return None
        operation = quantized_configs.operation(spec.scheme)
        dtype = quantized_configs.entry_dtype(spec.scheme, spec.dtype)
        at = (device.arch, device.units, operation)
        names = {size: configs.bucket_name(size, spec.n, spec.k) for size in quantized_configs.BUCKETS}
        found = table.crossover({size: configs.lookup(*at, name, dtype) for size, name in names.items()})
        if found is None or found.slower_from is None:
            return found
        beyond = [way for size, way in _ways(spec, device).items() if size >= found.slower_from]
        return replace(found, beyond=", ".join(dict.fromkeys(beyond)))

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
        from backbench.backends.triton.launch import place_of

        if isinstance(packed, QuantizedWeight):
            return self._quantized(x, packed, bias)
        if isinstance(packed, SparseWeight):
            return self._sparse(x, packed, bias)
        arch, units, _ = place_of(x.device)
        n, k = packed.shape
        return self.product(x, packed, configs.choose(arch, units, x.shape[0], n, k, x.dtype), bias)

    def rounding(self, packed: Packed) -> str | None:
        """Those whose scales come from the row itself, unless its columns are put in another order first."""
        if not isinstance(packed, QuantizedWeight) or packed.order is not None:
            return None
        return packed.scheme.activation if packed.scheme.activation in ROUNDINGS else None

    def run_rounded(self, rows: RoundedRows, packed: Packed, bias: Tensor | None = None) -> Tensor:
        assert isinstance(packed, QuantizedWeight)
        return self._quantized(rows, packed, bias)

    def _quantized(
        self, x: Tensor | RoundedRows, packed: QuantizedWeight, bias: Tensor | None = None
    ) -> Tensor:
        from backbench.backends.triton.launch import place_of
        from backbench.backends.triton.quantized import run_quantized

        arch, units, _ = place_of(packed.codes.device)
        shape = (x.shape[0], packed.n, packed.k)
        way = quantized_configs.choose(arch, units, *shape, packed.scheme, x.dtype)
        return run_quantized(x, packed, way, bias)

    def _sparse(self, x: Tensor, packed: SparseWeight, bias: Tensor | None = None) -> Tensor:
        from backbench.backends.triton.launch import place_of
        from backbench.backends.triton.sparse import run_sparse

        arch, units, _ = place_of(x.device)
        shape = (x.shape[0], packed.n, packed.k)
        way = quantized_configs.choose(arch, units, *shape, packed.scheme, x.dtype)
        return run_sparse(x, packed, way, bias)

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
        at = (device.arch, device.units, spec.n, spec.k)
        if spec.scheme.dense:
            return configs.product_tuning(*at, spec.dtype)
        return quantized_configs.tuning(*at, spec.scheme, spec.dtype)


def _ways(spec: WeightSpec, device: Device) -> dict[int, str]:
    """Bucket of rows -> the way that serves a quantized or sparse weight there."""
    at, of = (device.arch, device.units), (spec.n, spec.k, spec.scheme, spec.dtype)
    return {
        size: quantized_configs.describe(quantized_configs.choose(*at, size, *of))
        for size in quantized_configs.BUCKETS
    }


def scheme_refused(scheme: Scheme, n: int, k: int, arch: str) -> list[str]:
    """What the kernels lack for a quantized or compressed [n, k] weight on such a GPU; empty = nothing."""
    if scheme.compressed:
        return sparse_refused(scheme, k)
    reasons = []
    eight = scheme.weight == "fp8" or scheme.scale == "e4m3" or (scheme.activation or "").startswith("fp8-")
    if eight and (arch == "gfx90a" or (arch.startswith("sm") and int(arch[2:]) < 89)):
        reasons.append(f"{arch} cannot convert fp8 codes and scales")
    packed = scheme.weight in PACKED
    if scheme.weight not in ("int8", "int4", "fp8", "fp4"):
        reasons.append(f"no kernel reads {scheme.weight} weights")
    if scheme.zero_point and scheme.weight not in ("int8", "int4"):
        reasons.append("zero points are for integers")
    if scheme.activation is not None and scheme.activation not in quantization.ACTIVATIONS:
        reasons.append(f"no rounding of rows is called {scheme.activation}")
    if packed and scheme.activation == "fp8-group128":
        reasons.append("rows rounded in groups of 128 go with eight-bit weights")
    least = 16 if packed else 32
    if scheme.group is not None and scheme.group % least:
        reasons.append(f"groups of {scheme.group} columns are no multiple of {least}")
    elif scheme.group is not None and not packed and scheme.group not in (32, 64) and scheme.group % 128:
        reasons.append(f"groups of {scheme.group} columns do not divide into steps of 128")
    if scheme.activation in NATIVE_ACTIVATIONS and k > LARGEST_ROW:
        reasons.append(f"rows of {k} features are rounded at once up to {LARGEST_ROW}")
    return reasons
