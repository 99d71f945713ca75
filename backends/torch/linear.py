"""Linear layers through torch's own matrix multiplication (oneDNN, cuBLAS or hipBLASLt), in every scheme.

A quantized or compressed weight means what `quantization.dequantize` says. Weights whose rows are not rounded
are dequantized in the rows' dtype, some output features at a time, and multiplied; where rows are rounded as
well, all of it is in fp32. On a CPU two cases take torch's own int8 kernels; one thread of an AMD EPYC with
AVX-512, beside a dense product of the same shape and dtype, weights of 256x1280 to 2048x6144:

- int8 weights and rows through `_int_mm`: 0.15 to 0.4 of dense from 1024x4096 on, 0.7 to 1.8 at 256x1280,
  where rounding the rows takes most of it; and the sum of integers is exact. Always taken.
- int8 weights alone, codes as numbers and the scale after the sum: 0.9 to 1.1 of dense from 1024x4096 on, 1.4
  to 2.5 at 256x1280. Taken in fp32 and bf16; fp16 could overflow before the scale.
- the same through `_weight_int8pack_mm`: in bf16 0.4 to 0.8 of dense up to 4 rows, slower than the former
  from 16 on; in fp32 5 to 40 times dense. Taken for few rows of bf16.

Two to four dense fp32 rows on several CPU threads are multiplied as columns: torch's product of few rows runs
on one thread, at the price of as many single rows, that of few columns on all of them. Two threads of the
same machine, weights of 256x640 to 4096x256: 0.5 to 0.9 of the time for two rows and for three, 0.6 to 0.9
for four.

On a GPU everything is dequantized: this is what other backends' kernels are checked against.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from backbench.backends.interface import Device, Linear, Scheme, Weight, WeightSpec
from backbench.backends.quantization import ACTIVATIONS, dequantize, meant_rows, rounded_rows, rows_at_once
from backbench.errors import BackendError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("dense", "int8", "int4", "fp8", "fp4")
FEW_COLUMNS = range(2, 5)
"""Rows of fp32 that several CPU threads multiply as columns."""
FEW_ROWS = 4
"""Rows up to which bf16 goes through `_weight_int8pack_mm`."""


class TorchLinear(Linear):
    """Weights in every scheme. The packed form of a dense weight is the contiguous [N, K] tensor, that of any
    other the canonical weight itself."""

    name = "torch"

    def refusals(self, spec: WeightSpec, device: Device) -> list[str]:
        reasons = []
        if spec.scheme.weight not in KINDS or spec.scheme.activation not in (None, *ACTIVATIONS):
            reasons.append(f"the scheme {spec.scheme} is unknown")
        if spec.dtype not in DTYPES:
            reasons.append(f"dtype {spec.dtype} is none of float32, bfloat16, float16")
        return reasons

    def pack(self, weight: Weight, device: Device) -> Tensor | Weight:
        dtype = torch.float32 if weight.scheme.quantized else weight.q.dtype
        if reasons := self.refusals(weight.spec("packed", dtype), device):
            raise BackendError(f"{self.name} linear cannot serve this weight: {'; '.join(reasons)}.")
        held = weight.to(device.torch_device)
        held = replace(held, q=held.q.contiguous())
        plain = weight.scheme.dense and weight.scheme.activation is None and weight.order is None
        return held.q if plain else held

    def unpack(self, packed: Any) -> Weight | None:
        return packed if isinstance(packed, Weight) else None

    def served_by(self, spec: WeightSpec, device: Device) -> str:
        scheme = spec.scheme
        if scheme.dense and scheme.activation is None:
            return self.name
        on_cpu = device.torch_device.type == "cpu" and scheme.weight == "int8" and _a_scale_a_row(scheme)
        if on_cpu and scheme.activation in ("int8-token", "int8-tensor"):
            return f"{self.name}, int8 by int8"
        if on_cpu and scheme.activation is None and spec.dtype != torch.float16:
            return f"{self.name}, int8 weights"
        return f"{self.name}, {'expanded' if scheme.compressed else 'dequantized'}"

    def run(self, x: Tensor, packed: Any, bias: Tensor | None = None) -> Tensor:
        if isinstance(packed, Tensor):
            return dense_product(x, packed, bias)
        out = quantized_product(x, packed)
        return out if bias is None else out + bias


def dense_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [M, K] by the transpose of a weight [N, K], plus a bias [N]: [M, N] in x's dtype."""
    few = x.device.type == "cpu" and x.dtype == torch.float32 and x.shape[0] in FEW_COLUMNS
    if not few or torch.get_num_threads() == 1:
        return functional.linear(x, weight, bias)
    out = torch.mm(weight, x.t()).t().contiguous()
    return out if bias is None else out.add_(bias)


def quantized_product(x: Tensor, weight: Weight) -> Tensor:
    """x [M, K] by the transpose of a weight in any scheme: [M, N] in x's dtype."""
    scheme = weight.scheme
    if x.device.type == "cpu" and scheme.weight == "int8" and _a_scale_a_row(scheme):
        if scheme.activation in ("int8-token", "int8-tensor"):
            return _int8_by_int8(x, weight)
        if scheme.activation is None and x.dtype != torch.float16:
            return _int8_weights(x if weight.order is None else x[:, weight.order], weight)
    return _dequantized(meant_rows(x, weight), weight, x.dtype)


def _a_scale_a_row(scheme: Scheme) -> bool:
    """Codes around zero, and one scale for every output feature: it can come after the sum."""
    return scheme.group is None and scheme.group_n == 1 and not scheme.zero_point and scheme.scale == "float"


def _int8_by_int8(x: Tensor, weight: Weight) -> Tensor:
    """Codes by codes, summed exactly as integers; both scales come after the sum."""
    assert weight.scale is not None and weight.scheme.activation is not None
    x = x if weight.order is None else x[:, weight.order]
    codes, scale = rounded_rows(x, weight.scheme.activation, weight.input_scale)
    return (torch._int_mm(codes, weight.q.t()) * scale * weight.scale.float().t()).to(x.dtype)


def _int8_weights(x: Tensor, weight: Weight) -> Tensor:
    """Rows by int8 codes as numbers, which every float of 16 bits or more but fp16's sums hold."""
    assert weight.scale is not None
    if x.dtype == torch.bfloat16 == weight.scale.dtype and 0 < x.shape[0] <= FEW_ROWS:
        return torch._weight_int8pack_mm(x.contiguous(), weight.q, weight.scale.flatten())
    scale = weight.scale.flatten().to(x.dtype)
    rows = rows_at_once(weight.k, weight.scheme, x.device)
    if rows >= weight.n:
        return functional.linear(x, weight.q.to(x.dtype)) * scale
    out = x.new_empty(x.shape[0], weight.n)
    for start in range(0, weight.n, rows):
        codes = weight.q[start : start + rows].to(x.dtype)
        torch.mul(functional.linear(x, codes), scale[start : start + rows], out=out[:, start : start + rows])
    return out


def _dequantized(x: Tensor, weight: Weight, dtype: torch.dtype) -> Tensor:
    """x [M, K] by the weight's numbers in x's dtype, never all of them at once: [M, N] in `dtype`."""
    rows = rows_at_once(weight.k, weight.scheme, x.device)
    if rows >= weight.n:
        return functional.linear(x, dequantize(weight, x.dtype)).to(dtype)
    out = x.new_empty((x.shape[0], weight.n), dtype=dtype)
    for start in range(0, weight.n, rows):
        stop = min(start + rows, weight.n)
        out[:, start:stop] = functional.linear(x, dequantize(weight.rows(start, stop), x.dtype))
    return out
