"""Norm and gate that leave codes: bit for bit what they are alone, then rounded; in the interpreter without a
GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from backbench.backends import quantization
from backbench.backends.interface import RoundedRows
from backbench.backends.quantization import ACTIVATIONS, SCHEMES
from backbench.backends.triton.linear import TritonLinear
from backbench.backends.triton.operations import TritonOperations
from backbench.backends.triton.quantized_configs import Dequantized, Kernel
from backbench.backends.triton.quantized_weight import ROUNDINGS, pack_weight

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = 1e-6
TRITON = TritonOperations()


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def assert_rounds(found: RoundedRows, numbers: Tensor, activation: str) -> None:
    codes, scale = quantization.rounded_rows(numbers.cpu(), activation)
    assert found.dtype == numbers.dtype
    assert found.codes.dtype == codes.dtype
    assert torch.equal(found.codes.cpu().float(), codes.float())
    assert torch.equal(found.scale.cpu().view(scale.shape), scale)


@pytest.mark.parametrize("activation", ROUNDINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "width"), [(1, 4096), (3, 384)])
def test_norm(activation: str, dtype: torch.dtype, rows: int, width: int) -> None:
    """A row whose sum is 0 stays finite."""
    x, residual = random(rows, width, dtype=dtype), random(rows, width, dtype=dtype, seed=1)
    x = torch.cat([x, -residual[:1]])
    residual = torch.cat([residual, residual[:1]])
    weight = 1 + random(width, dtype=dtype, seed=2) / 10
    normed, carried = TRITON.add_rms_norm(x, residual.clone(), weight, EPS)
    kept = residual.clone()
    found, returned = TRITON.rounded_add_rms_norm(x, kept, weight, EPS, activation)
    assert returned is kept
    assert torch.equal(kept, carried)
    assert_rounds(found, normed, activation)


def test_norm_of_strided_rows() -> None:
    wide, residual, weight = random(4, 640), random(4, 256, seed=1), random(256, seed=2)
    normed, _ = TRITON.add_rms_norm(wide[:, 384:], residual.clone(), weight, EPS)
    found, _ = TRITON.rounded_add_rms_norm(wide[:, 384:], residual.clone(), weight, EPS, "fp8-token")
    assert_rounds(found, normed, "fp8-token")


@pytest.mark.parametrize("activation", ROUNDINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "width"), [(1, 1536), (3, 384), (17, 256)])
def test_gate(activation: str, dtype: torch.dtype, rows: int, width: int) -> None:
    stacked = random(rows, 2 * width, dtype=dtype)
    assert_rounds(TRITON.rounded_gate(stacked, activation), TRITON.gate(stacked), activation)


def test_no_rows() -> None:
    x = random(2, 256)[:0]
    for found in (
        TRITON.rounded_gate(x, "fp8-token"),
        TRITON.rounded_add_rms_norm(x, x.clone(), random(256), EPS, "int8-token")[0],
    ):
        assert found.shape[0] == 0


WAYS = (
    Kernel(0, 4, 4, spans=2),
    Kernel(16, 64, 4, 2, swap=True),
    Kernel(16, 64, 4, 2, swap=True, split=2),
    Dequantized(),
)


@pytest.mark.parametrize("name", ["int8-w8a8", "fp8", "fp8-block"])
@pytest.mark.parametrize("way", WAYS, ids=["vector", "wide", "parts", "dequantized"])
def test_a_product_takes_rounded_rows_as_its_own(
    name: str, way: Kernel | Dequantized, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, in every way; and it rounds nothing again."""
    from backbench.backends.triton import quantized, quantized_configs

    scheme, linear = SCHEMES[name], TritonLinear()
    assert scheme.activation is not None
    packed = pack_weight(quantization.quantize(random(160, 384, seed=4).cpu(), scheme), DEVICE)
    x, bias = random(1, 384), random(160, seed=5)
    monkeypatch.setattr(quantized_configs, "choose", lambda *_: way)
    expected = linear.run(x, packed, bias)
    assert linear.rounding(packed) == scheme.activation
    codes, scale = quantization.rounded_rows(x.cpu(), scheme.activation)
    scale = scale if ACTIVATIONS[scheme.activation][1] is not None else scale.flatten()
    rows = RoundedRows(codes.to(DEVICE), scale.to(DEVICE), x.dtype)
    monkeypatch.setattr(quantized, "rounding_launch", None)
    assert torch.equal(linear.run_rounded(rows, packed, bias), expected)
    assert linear.run_rounded(RoundedRows(rows.codes[:0], rows.scale[:0], x.dtype), packed).shape == (0, 160)


def test_which_products_take_rounded_rows() -> None:
    """Not those that leave rows as they are, round to a given scale, or take columns in another order."""
    linear, dense = TritonLinear(), random(64, 256).cpu()
    plain = pack_weight(quantization.quantize(dense, SCHEMES["int8"]), DEVICE)
    eight = pack_weight(quantization.quantize(dense, SCHEMES["fp8"]), DEVICE)
    assert linear.rounding(dense) is None
    assert linear.rounding(plain) is None
    assert linear.rounding(replace(eight, scheme=replace(eight.scheme, activation="fp8-tensor"))) is None
    assert linear.rounding(replace(eight, order=torch.arange(256))) is None
    assert linear.rounding(eight) == "fp8-token"
