"""The torch backend on quantized weights: right whichever way it takes, and alone as in company."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from backbench.backends import quantization
from backbench.backends.conformance.oracle import quantized_linear
from backbench.backends.conformance.quantized_cases import KEPT, draw_weight, sure_rows
from backbench.backends.conformance.tolerance import CEILING_ROUNDINGS, deviation, rounding
from backbench.backends.interface import PackedWeight, Scheme, Weight, WeightSpec
from backbench.backends.interface.device import cpu
from backbench.backends.quantization import quantize
from backbench.backends.torch.linear import TorchLinear

LINEAR = TorchLinear()


def drawn(kept: str, dtype: torch.dtype = torch.float32, n: int = 200, k: int = 384) -> Weight:
    return draw_weight(KEPT[kept], n, k, dtype, torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kept", KEPT)
def test_rows_some_at_a_time_are_the_whole_product(kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = drawn(kept, n=384)
    x = sure_rows(torch.randn(5, 384), weight)
    whole = LINEAR.run(x, weight)
    monkeypatch.setitem(quantization.VALUES_AT_ONCE, "cpu", 128 * 384)
    torch.testing.assert_close(LINEAR.run(x, weight), whole, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kept", ["int8-w8a8", "int8-w8a8 static"])
def test_int8_by_int8_does_not_depend_on_the_company(kept: str) -> None:
    """Sums of integers are exact, so that not a bit may differ."""
    weight, x = drawn(kept), torch.randn(33, 384)
    together = LINEAR.run(x, weight)
    for start, stop in ((0, 1), (7, 8), (5, 22), (32, 33)):
        assert torch.equal(LINEAR.run(x[start:stop], weight), together[start:stop])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kept", KEPT)
def test_a_row_alone_is_the_row_in_company(kept: str, dtype: torch.dtype) -> None:
    """To within the roundings that also a dense product has: its library picks another kernel for one row."""
    weight = drawn(kept, dtype)
    x = sure_rows(torch.randn(18, 384).to(dtype), weight)
    together = LINEAR.run(x, weight)
    limit = CEILING_ROUNDINGS * rounding(dtype) * float(together.abs().max())
    for rows in (1, 4):
        alone = LINEAR.run(x[:rows], weight)
        assert alone.dtype == dtype
        assert deviation(alone, together[:rows].double()).largest <= limit


def test_ordered_columns_and_int8_rows() -> None:
    weight = replace(drawn("int8-w8a8"), order=torch.randperm(384))
    x = torch.randn(4, 384)
    torch.testing.assert_close(
        LINEAR.run(x, weight), quantized_linear(x, weight, None).float(), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize(
    ("scheme", "dtype", "way"),
    [
        (Scheme(), torch.float32, "torch"),
        (Scheme(sparsity="2:4"), torch.float32, "torch, expanded"),
        (Scheme(sparsity="unstructured:0.5"), torch.float32, "torch"),
        (Scheme("int8"), torch.float32, "torch, int8 weights"),
        (Scheme("int8"), torch.float16, "torch, dequantized"),
        (Scheme("int8", group=128), torch.float32, "torch, dequantized"),
        (Scheme("int8", activation="int8-token"), torch.float32, "torch, int8 by int8"),
        (Scheme("fp8", activation="fp8-token"), torch.bfloat16, "torch, dequantized"),
    ],
)
def test_it_says_which_way_it_takes(scheme: Scheme, dtype: torch.dtype, way: str) -> None:
    assert LINEAR.served_by(WeightSpec("down", 64, 128, scheme, dtype), cpu()) == way


def test_few_rows_of_bf16_need_a_scale_of_bf16() -> None:
    """A checkpoint's fp32 scale must not be rounded for the sake of a kernel."""
    weight = drawn("int8", torch.bfloat16)
    wide = replace(weight, scale=weight.scale.float() * (1 + 2**-9))
    x = torch.randn(2, 384).bfloat16()
    wanted = quantized_linear(x, wide, None)
    limit = CEILING_ROUNDINGS * rounding(torch.bfloat16) * float(wanted.abs().max())
    assert deviation(LINEAR.run(x, wide), wanted).largest <= limit


def test_what_is_unknown_is_refused() -> None:
    (reason,) = LINEAR.refusals(WeightSpec("down", 8, 8, Scheme("int3"), torch.float32), cpu())
    assert "int3 is unknown" in reason
    assert LINEAR.refusals(
        WeightSpec("down", 8, 8, Scheme("int8", activation="int8-row"), torch.float32), cpu()
    )


class Shuffling(TorchLinear):
    """Packs its own way, as a kernel with a layout does."""

    gives_back = True

    def pack(self, weight, device):
        return {"rows": weight.q.flip(0).contiguous(), "rest": weight}

    def unpack(self, packed):
        return replace(packed["rest"], q=packed["rows"].flip(0)) if self.gives_back else None


def test_a_packed_weight_can_be_had_back_and_knows_what_is_read() -> None:
    weight = quantize(torch.randn(16, 64), Scheme("int8"))
    held = PackedWeight.of(LINEAR, weight, cpu())
    assert held.kept is None and held.canonical() is held.packed
    assert LINEAR.take(held, cpu()) is held.packed
    assert sum(each.nbytes for each in held.tensors()) == weight.num_bytes


def test_a_weight_that_cannot_be_had_back_is_kept_and_counted() -> None:
    weight = quantize(torch.randn(16, 64), Scheme("int8"))
    other = Shuffling()
    held = PackedWeight.of(other, weight, cpu())
    assert held.kept is None and torch.equal(held.canonical().q, weight.q)
    taken = LINEAR.take(held, cpu())
    assert torch.equal(taken.q, weight.q)
    other.gives_back = False
    assert PackedWeight.of(other, weight, cpu()).kept is weight


@pytest.mark.parametrize("rows", [1, 2, 4, 5])
@pytest.mark.parametrize("biased", [False, True])
def test_few_rows_on_several_threads_are_the_same_product(
    rows: int, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Multiplied as columns or not, fp32 sums of 256 terms in one order or another: 256 * 2**-24 of the
    terms' sum."""
    x, weight = torch.randn(rows, 256), torch.randn(48, 256)
    bias = torch.randn(48) if biased else None
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    out = TorchLinear().run(x, weight, bias)
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert out.is_contiguous() and out.shape == (rows, 48)
    assert bool(((out - exact).abs() <= 256 * 2**-24 * (x.abs() @ weight.abs().T + 1)).all())
