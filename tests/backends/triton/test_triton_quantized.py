"""Quantized products against the specification, in the interpreter without a GPU."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
from quantized_operands import AT, HERE, VARIANTS, broken, complaint, operands, random

from backbench.backends import quantization
from backbench.backends.interface import Device, Scheme, Weight, WeightSpec
from backbench.backends.quantization import ACTIVATIONS, SCHEMES
from backbench.backends.triton import quantized, quantized_configs
from backbench.backends.triton.linear import TritonLinear
from backbench.backends.triton.quantized import dequantized, multiply, rounded, run_quantized
from backbench.backends.triton.quantized_configs import BUCKETS, Dequantized, Kernel, ScaledProduct, choose
from backbench.backends.triton.quantized_tune import QuantizedProblem
from backbench.backends.triton.quantized_weight import pack_weight, unpack_weight
from backbench.errors import BackendError

H100 = Device("nvidia", "sm90", "H100", 132, 2**36, 227 * 1024, torch.device("cpu"))
HOPPER, MI300 = ("sm90", 132), ("gfx942", 304)
VECTOR = Kernel(0, 4, 4, spans=2)
NARROW = Kernel(16, 16, 4, 2)
WIDE = Kernel(16, 64, 4, 2, swap=True)
PARTS = Kernel(16, 64, 4, 2, swap=True, split=2, early=True)


@pytest.mark.parametrize(
    "config", [VECTOR, NARROW, WIDE, PARTS], ids=lambda each: f"{each.block_m}{each.swap}"
)
@pytest.mark.parametrize("name", VARIANTS)
def test_product(name: str, config: Kernel) -> None:
    scheme = VARIANTS[name]
    x, weight = operands(scheme, 1 if config.block_m == 0 else 5)
    bias = random(34).bfloat16().to(AT)
    packed = pack_weight(weight, AT)
    assert not complaint(multiply(x, packed, config, bias), x, weight, bias, early=config.early)


@pytest.mark.parametrize("name", ["int8", "int8-w8a8", "fp8", "fp8 weights alone"])
@pytest.mark.parametrize(("k", "split"), [(512, 1), (512, 2), (384, 1)])
def test_more_columns_at_a_time(name: str, k: int, split: int) -> None:
    config = Kernel(16, 64, 4, 2, swap=True, split=split, depth=256)
    for rows in (1, 5):
        x, weight = operands(VARIANTS[name], rows, k=k)
        assert not complaint(multiply(x, pack_weight(weight, AT), config), x, weight, early=False)


def test_more_columns_at_a_time_only_where_they_share_every_scale() -> None:
    def depths(scheme: Scheme, k: int = 4096, arch: str = "sm90") -> set[int]:
        return {each.depth for each in quantized_configs.launches(arch, 132, 1, 6144, k, scheme)}

    assert depths(SCHEMES["fp8"]) == depths(SCHEMES["int8"]) == {0, 256}
    assert depths(SCHEMES["fp8-block"]) == depths(SCHEMES["int4-g128"]) == {0}
    assert depths(SCHEMES["fp8"], k=4096 + 128) == depths(SCHEMES["fp8"], arch="gfx942") == {0}


@pytest.mark.parametrize("name", ["int4-g32", "nvfp4", "mxfp4", "fp8", "int8", "fp8-block"])
def test_fp16(name: str) -> None:
    for rows, config in ((1, VECTOR), (3, WIDE)):
        x, weight = operands(SCHEMES[name], rows, dtype=torch.float16)
        assert not complaint(multiply(x, pack_weight(weight, AT), config), x, weight, early=False)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_weight_written_out_is_the_specification(name: str) -> None:
    """Bit for bit, whatever its shape."""
    scheme = VARIANTS[name]
    for n, k in ((34, 384), (33, max(96, scheme.group or 0))):
        _, weight = operands(scheme, 1, n, k)
        packed = pack_weight(weight, AT)
        exact = quantization.dequantize(weight.to(torch.device("cpu")), torch.float32)
        assert torch.equal(dequantized(packed, torch.float32).cpu(), exact)


@pytest.mark.parametrize("name", ["int8", "fp8", "fp8-block", "int4-g32", "nvfp4", "int8-w8a8"])
@pytest.mark.parametrize("rows", [0, 1, 2, 17, 64, 300])
def test_run_serves_every_row_count(name: str, rows: int) -> None:
    x, weight = operands(SCHEMES[name], rows, n=40, k=256)
    linear = TritonLinear()
    got = linear.run(x, linear.pack(weight, HERE))
    assert got.shape == (rows, 40)
    assert rows == 0 or not complaint(got, x, weight)


@pytest.mark.parametrize("name", ["int8", "fp8", "fp8-block", "int4-g32", "nvfp4", "nvfp4 w4a4"])
def test_true_fp32(name: str) -> None:
    """By the library, on numbers that are the specification's own."""
    x, weight = operands(VARIANTS[name], 3, dtype=torch.float32)
    linear, bias = TritonLinear(), random(34).to(AT)
    assert not complaint(linear.run(x, linear.pack(weight, HERE), bias), x, weight, bias, early=False)


@pytest.mark.parametrize("way", [VECTOR, WIDE, Dequantized()])
def test_columns_out_of_order(way: Any) -> None:
    x, weight = operands(SCHEMES["int4-g32"], 1)
    weight.order = torch.randperm(weight.k, generator=torch.Generator().manual_seed(5)).to(AT)
    got = run_quantized(x, pack_weight(weight, AT), way)
    assert not complaint(got, x, weight)


@pytest.mark.parametrize("name", VARIANTS)
def test_depth_that_fills_no_tile(name: str) -> None:
    scheme = VARIANTS[name]
    k = 96 if scheme.group in (None, 16, 32) else 128 * 3
    for rows, config in ((1, VECTOR), (3, WIDE), (3, PARTS)):
        x, weight = operands(scheme, rows, n=65, k=k)
        assert not complaint(multiply(x, pack_weight(weight, AT), config), x, weight, early=True)


@pytest.mark.parametrize(
    "activation", [name for name in ACTIVATIONS if ACTIVATIONS[name][2] in ("float", "static")]
)
def test_rows_are_rounded_as_specified(activation: str) -> None:
    """Bit for bit: ties, the largest, zeros and numbers below the smallest scale."""
    x = random(6, 384)
    x[1] = (torch.arange(384) - 192) / 2.0
    x[2], x[3], x[4, ::2] = 0, 1e-30, 3e4
    weight = pack_weight(operands(SCHEMES["fp8"], 1)[1], AT)
    weight.scheme = Scheme("int8", activation=activation)
    weight.input_scale = torch.tensor([0.25], device=AT) if ACTIVATIONS[activation][2] == "static" else None
    x = x.bfloat16().to(AT)
    got = rounded(x, weight)
    codes, scale = quantization.rounded_rows(
        x.cpu(), activation, None if weight.input_scale is None else weight.input_scale.cpu()
    )
    assert got.scale is not None
    assert torch.equal(got.x.cpu().float(), codes.float())
    assert torch.equal(got.scale.cpu().view(6, -1), scale)


@pytest.mark.parametrize("name", ["int4-g128", "nvfp4", "fp8", "fp8-block"])
@pytest.mark.parametrize("config", [WIDE, PARTS], ids=["whole", "parts"])
def test_a_row_does_not_depend_on_its_company(name: str, config: Kernel) -> None:
    x, weight = operands(SCHEMES[name], 9)
    packed = pack_weight(weight, AT)
    together = multiply(x, packed, config)
    for row in (0, 4, 8):
        assert torch.equal(multiply(x[row : row + 1], packed, config)[0], together[row])


def test_rows_may_be_strided() -> None:
    x, weight = operands(SCHEMES["int4-g128"], 6)
    assert not complaint(run_quantized(x[::2], pack_weight(weight, AT), WIDE), x[::2], weight)


@pytest.mark.parametrize("config", [VECTOR, WIDE, PARTS], ids=["vector", "wide", "parts"])
def test_planted_faults_are_seen(config: Kernel) -> None:
    x, weight = operands(Scheme("int4", group=32, zero_point=True), 1)
    packed = pack_weight(weight, AT)
    assert not complaint(multiply(x, packed, config), x, weight)
    for fault, wrong in broken(packed).items():
        assert complaint(multiply(x, wrong, config), x, weight), fault


def test_packing_takes_no_more_than_the_codes() -> None:
    _, weight = operands(SCHEMES["int4-g128"], 1, n=64, k=512)
    packed = pack_weight(weight, AT)
    assert packed.codes.nbytes == weight.q.nbytes == 64 * 512 // 2
    assert packed.num_bytes == weight.num_bytes


def test_what_is_not_served_is_said() -> None:
    def reasons(scheme: Scheme) -> str:
        spec = WeightSpec("qkv", 64, 512, scheme, torch.bfloat16)
        return "; ".join(TritonLinear().refusals(spec, HERE))

    assert all(not reasons(scheme) for scheme in VARIANTS.values())
    assert not reasons(Scheme(sparsity="unstructured:0.5"))
    assert "groups of 24 columns" in reasons(Scheme("int4", group=24))
    assert "groups of 16 columns" in reasons(Scheme("int8", group=16))
    assert "no kernel reads int3" in reasons(Scheme("int3"))
    assert "eight-bit weights" in reasons(Scheme("int4", group=128, activation="fp8-group128"))
    weight = Weight(Scheme("int8", group=16), torch.zeros(8, 16, dtype=torch.int8), torch.ones(8, 1))
    with pytest.raises(BackendError, match="groups of 16"):
        TritonLinear().pack(weight, HERE)


UNTUNED = ("sm90", 114)


def test_ways() -> None:
    """Kernels for few rows; for many the library where it takes the codes, or the weight written out.

    By the written rule: of an untuned GPU.
    """
    assert choose(*MI300, 1, 28672, 4096, SCHEMES["int4-g128"], torch.bfloat16).block_m == 0
    assert choose(*MI300, 1, 28672, 4096, SCHEMES["fp8"], torch.bfloat16).block_m == 0
    assert choose(*UNTUNED, 1, 28672, 4096, SCHEMES["int4-g128"], torch.bfloat16).block_m == 16
    assert choose(*UNTUNED, 1, 28672, 4096, SCHEMES["fp8"], torch.bfloat16).block_m == 16
    assert choose(*UNTUNED, 16, 28672, 4096, SCHEMES["int4-g128"], torch.bfloat16).block_m == 16
    assert choose(*UNTUNED, 8192, 28672, 4096, SCHEMES["int4-g128"], torch.bfloat16) == Dequantized()
    assert choose(*UNTUNED, 9000, 28672, 4096, SCHEMES["fp8"], torch.bfloat16) == ScaledProduct()
    assert isinstance(choose(*UNTUNED, 9000, 28672, 4096, SCHEMES["fp8"], torch.float16), Kernel)
    assert isinstance(choose(*MI300, 9000, 28672, 4096, SCHEMES["fp8"], torch.bfloat16), Kernel)
    assert choose(*UNTUNED, 1, 28672, 4096, SCHEMES["int8"], torch.float32) == Dequantized()


def test_the_way_of_every_row_count_is_told() -> None:
    spec = WeightSpec("qkv", 100, 4096, SCHEMES["int4-g32"], torch.bfloat16)
    told = TritonLinear().tuning(spec, H100)
    assert told is not None
    assert len(told) == len(BUCKETS)
    assert told["m1 n100 k4096 int4(group=32): matrix kernel 16x128"] == "no entry for sm90-132"
    assert "m8192 n100 k4096 int4(group=32): dequantized" in told


@pytest.mark.parametrize("name", SCHEMES)
def test_launches_worth_trying_are_possible(name: str) -> None:
    for size in BUCKETS:
        for config in quantized_configs.launches(*HOPPER, size, 28672, 4096, SCHEMES[name]):
            assert config.block_m == 0 or config.block_n >= (64 if config.swap else 16)
            assert (config.block_m == 0) <= (size == 1)


@pytest.mark.parametrize("name", ["int4-g32", "fp8", "nvfp4"])
def test_right_products_pass_the_tuning_check_and_wrong_ones_do_not(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = QuantizedProblem(3, 48, 256, SCHEMES[name], torch.bfloat16, HERE, cold_bytes=20_000)
    launch = asdict(WIDE)
    assert len(problem.weights) > 1
    assert problem.error(launch) < problem.tolerance
    assert problem.error(problem.baseline()) < problem.tolerance
    monkeypatch.setattr(quantized, "multiply", lambda *given: 1.02 * multiply(*given))
    assert problem.error(launch) > problem.tolerance


def test_a_tuning_entry_holds_any_way() -> None:
    for each in (WIDE, VECTOR, Dequantized(), ScaledProduct()):
        assert quantized_configs.way(asdict(each)) == each


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("k", [256, 288])
def test_a_packed_weight_can_be_had_back(name: str, k: int) -> None:
    scheme = VARIANTS[name]
    if k % (scheme.group or k):
        pytest.skip("these columns do not divide into groups")
    _, weight = operands(scheme, 1, k=k)
    found = unpack_weight(pack_weight(weight, torch.device("cpu")))
    assert (found.n, found.k, found.scheme.activation) == (weight.n, weight.k, scheme.activation)
    meant = quantization.dequantize(weight, torch.float32)
    assert torch.equal(quantization.dequantize(found, torch.float32), meant)
    if scheme.weight in ("int4", "fp4"):
        assert torch.equal(found.q, weight.q)


def test_the_way_of_every_number_of_rows_is_said() -> None:
    spec = WeightSpec("down", 4096, 12288, SCHEMES["int4-g128"], torch.bfloat16)
    said = TritonLinear().served_by(spec, H100)
    assert said.startswith("triton, ") and f"to {BUCKETS[-1]} rows" in said
