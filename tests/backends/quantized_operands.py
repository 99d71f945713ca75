"""Rows and quantized weights for kernels' tests, and what is off about a product of them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from backbench.backends import quantization
from backbench.backends.interface import Scheme, Weight
from backbench.backends.interface import device as devices
from backbench.backends.interface.device import cpu
from backbench.backends.quantization import SCHEMES
from backbench.backends.triton.quantized_weight import QuantizedWeight

HERE = devices.gpu(0) if torch.cuda.is_available() else cpu(interpret=True)
AT = HERE.torch_device
VARIANTS = {
    **SCHEMES,
    "int4 with zero points": Scheme("int4", group=128, zero_point=True),
    "int4-g32 with zero points": Scheme("int4", group=32, zero_point=True),
    "int4 a row, with zero points": Scheme("int4", zero_point=True),
    "int4 a row": Scheme("int4"),
    "int4-g16": Scheme("int4", group=16),
    "int4-g16 with zero points": Scheme("int4", group=16, zero_point=True),
    "int4 w4a8": Scheme("int4", group=128, activation="fp8-token"),
    "int8-g128": Scheme("int8", group=128),
    "int8-g32 with zero points": Scheme("int8", group=32, zero_point=True),
    "int8 w8a8 with zero points": Scheme("int8", zero_point=True, activation="int8-token"),
    "fp8 weights alone": Scheme("fp8"),
    "mxfp8": Scheme("fp8", group=32, scale="e8m0", activation="mxfp8"),
    "mxfp4 w4a4": replace(SCHEMES["mxfp4"], activation="mxfp4"),
    "nvfp4 w4a4": replace(SCHEMES["nvfp4"], activation="nvfp4"),
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def operands(
    scheme: Scheme, rows: int, n: int = 34, k: int = 256, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Weight]:
    """Rows and a weight whose groups differ in size."""
    dense = (random(n, k, seed=1) * torch.exp(random(n, k // 32, seed=2)).repeat_interleave(32, 1)) / k**0.5
    weight = quantization.quantize(dense.to(dtype), scheme)
    if scheme.activation == "nvfp4":
        weight.input_scale = torch.tensor([0.003])
    return random(rows, k, seed=3).to(dtype).to(AT), weight.to(AT)


def complaint(got: Tensor, x: Tensor, weight: Weight, bias: Tensor | None = None, early: bool = True) -> str:
    """What is off by more than roundings: empty = nothing.

    A result is rounded once (the interpreter cuts bf16 off, which is twice that), and so is every scaled
    number of a four-bit weight where `early`; fp32 sums of some hundred terms, and fp16 rows of microscaled
    numbers, add little.
    """
    exact = quantization.product(x.cpu(), weight.to(torch.device("cpu")))
    magnitudes = replace(weight.to(torch.device("cpu")), scheme=replace(weight.scheme, activation=None))
    dense = quantization.dequantize(magnitudes, torch.float32).abs()
    ordered = x.cpu() if weight.order is None else x.cpu()[:, weight.order.cpu()]
    terms = ordered.float().abs() @ dense.T
    exact = exact if bias is None else exact + bias.cpu().float()
    unit = torch.finfo(got.dtype).eps
    slack = 2.0**-18 + (unit if early else 0)
    over = ((got.cpu().float() - exact).abs() - unit * exact.abs() - slack * terms).max()
    return f"off by {float(over)} more than roundings" if not over <= 0 else ""


def broken(weight: QuantizedWeight) -> dict[str, QuantizedWeight]:
    """One fault each."""
    assert weight.zero is not None
    codes = (weight.codes.int() >> 4 & 0x0F0F) | (weight.codes.int() << 4 & 0xF0F0)
    return {
        "nibbles swapped": replace(weight, codes=(codes - (codes >= 2**15).int() * 2**16).short()),
        "the scale of the next row": replace(weight, scale=weight.scale.roll(1, 1)),
        "the scale of the next group": replace(weight, scale=weight.scale.roll(1, 0)),
        "zero points ignored": replace(weight, zero=torch.full_like(weight.zero, 8)),
    }
