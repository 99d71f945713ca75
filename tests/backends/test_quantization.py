"""What quantized numbers mean, against definitions written out by hand."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from backbench.backends import quantization
from backbench.backends.interface import Scheme, Weight, join
from backbench.backends.quantization import (
    FP4_VALUES,
    SCHEMES,
    dequantize,
    head_numbers,
    kept_heads,
    quantize,
    rounded_heads,
    rounded_rows,
)
from backbench.errors import BackendError

ASYMMETRIC = (Scheme("int4", group=32, zero_point=True), Scheme("int8", group=32, zero_point=True))
ALL = [*SCHEMES.values(), *ASYMMETRIC]
HALF_A_STEP = {"int8": 0.5, "int4": 0.5, "fp4": 1.0}
"""Largest rounding error in units of the scale: fp4's last two numbers are 2 apart."""


def dense(seed: int = 0, n: int = 256, k: int = 256, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=generator).to(dtype)


@pytest.mark.parametrize("scheme", ALL, ids=str)
def test_rounding_is_to_the_nearest(scheme):
    x = dense()
    weight = quantize(x, scheme)
    error = (dequantize(weight, torch.float32) - x).abs()
    scale = quantization.scale_values(weight)
    if weight.row_scale is not None:
        scale = scale * weight.row_scale[:, None]
    step = scale.repeat_interleave(scheme.group_n, 0).repeat_interleave(scheme.group or 256, 1)
    if scheme.weight == "fp8":
        # e4m3 has 3 bits of mantissa, and 2^-9 below its normal numbers.
        assert (error <= torch.maximum(x.abs() / 16, step * 2**-10) * 1.0001).all()
        return
    # A symmetric integer's largest element may lie half a step beyond its last code, and MXFP4's scale
    # may leave it at up to 7 of 6; an e4m3 scale is rounded by up to a 16th itself.
    allowed = {"e8m0": 1.0, "e4m3": 1.0 + 6 / 16, "float": HALF_A_STEP[scheme.weight]}[scheme.scale]
    assert (error <= step * allowed * 1.0001).all()
    assert error.max() > 0


@given(st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=64))
def test_fp4_takes_the_nearest_number_and_ties_to_the_even_code(numbers):
    x = torch.tensor(numbers)
    table = torch.tensor(FP4_VALUES)
    distance = (x.abs()[:, None] - table).abs()
    nearest = distance.amin(1, keepdim=True)
    for number, code, is_nearest in zip(x, quantization.fp4_codes(x), distance == nearest, strict=True):
        ties = is_nearest.nonzero().flatten().tolist()
        wanted = ties[0] if len(ties) == 1 else next(tie for tie in ties if tie % 2 == 0)
        assert int(code) & 7 == wanted
        assert bool(int(code) & 8) == bool(torch.signbit(number))


def test_every_fp4_code_is_its_number():
    values = quantization.fp4_values(torch.arange(16, dtype=torch.uint8))
    assert values.tolist() == [*FP4_VALUES, *(-value for value in FP4_VALUES)]
    assert torch.signbit(values).tolist() == [False] * 8 + [True] * 8


def test_four_bits_lie_low_half_first():
    codes = torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)
    assert quantization.packed(codes).tolist() == [[0x21, 0x0F]]
    assert torch.equal(quantization.unpacked(quantization.packed(codes)), codes)


def test_a_weight_means_code_less_zero_times_scale():
    q = quantization.packed(torch.tensor([[0, 8, 15, 3]], dtype=torch.uint8))
    scale = torch.tensor([[2.0, 10.0]])
    symmetric = Weight(Scheme("int4", group=2), q, scale)
    assert dequantize(symmetric, torch.float32).tolist() == [[-16.0, 0.0, 70.0, -50.0]]
    zero = torch.tensor([[1, 3]], dtype=torch.uint8)
    shifted = Weight(Scheme("int4", group=2, zero_point=True), q, scale, zero)
    assert dequantize(shifted, torch.float32).tolist() == [[-2.0, 14.0, 120.0, 0.0]]
    fp4 = Weight(Scheme("fp4", group=2, scale="e8m0"), q, torch.tensor([[127, 128]], dtype=torch.uint8))
    assert dequantize(fp4, torch.float32).tolist() == [[0.0, -0.0, -12.0, 3.0]]


@pytest.mark.parametrize("scheme", ALL, ids=str)
def test_parts_of_a_weight_mean_the_parts_of_what_it_means(scheme):
    weight = quantize(dense(), scheme)
    whole = dequantize(weight, torch.float32)
    for dim in (0, 1):
        parts = [dequantize(weight.shard(dim, rank, 2), torch.float32) for rank in range(2)]
        assert torch.equal(torch.cat(parts, dim), whole)
    joined = join([weight.rows(0, 128), weight.rows(128, 256)])
    assert torch.equal(dequantize(joined, torch.float32), whole)
    assert joined.num_bytes == weight.num_bytes
    with pytest.raises(BackendError, match="cannot be split into 3"):
        weight.shard(0, 0, 3)
    if scheme.group is not None:
        with pytest.raises(BackendError, match="cut through a group"):
            weight.columns(0, scheme.group // 2)


@pytest.mark.parametrize("activation", ["int8-token", "fp8-token", "fp8-group128", "mxfp8", "mxfp4"])
@settings(max_examples=20)
@given(st.integers(0, 1000))
def test_rows_are_rounded_each_by_itself(activation, seed):
    """A row's codes must not depend on which others are in the batch."""
    x = dense(seed, n=5) * torch.tensor([1.0, 1e-3, 1e3, 0.0, 7.0])[:, None]
    codes, scale = rounded_rows(x, activation)
    for row in range(5):
        own, own_scale = rounded_rows(x[row : row + 1], activation)
        assert torch.equal(own[0].float(), codes[row].float()) and torch.equal(own_scale[0], scale[row])
    number = (codes.float().unflatten(1, (scale.shape[1], -1)) * scale[..., None]).flatten(1)
    # MXFP4's largest may lie half-way from 4 to 6; otherwise e4m3's half step, or less.
    worst = {"mxfp4": 1 / 5}.get(activation, 1 / 16)
    assert ((number - x).abs().amax(1) <= x.abs().amax(1) * worst * 1.001).all()


def test_static_and_two_level_activations_use_the_checkpoint_s_scale():
    x = dense(n=2)
    codes, scale = rounded_rows(x, "int8-tensor", torch.tensor([0.5]))
    assert torch.equal(codes.float(), (x / 0.5).round()) and (scale == 0.5).all()
    codes, scale = rounded_rows(x, "nvfp4", torch.tensor([2e-3]))
    number = (codes.unflatten(1, (16, -1)) * scale[..., None]).flatten(1)
    assert ((number - x).abs() <= x.abs().amax() * 0.2).all()


def test_a_product_follows_the_order_of_columns():
    weight, x = quantize(dense(), SCHEMES["int8"]), dense(1, n=3)
    order = torch.randperm(256)
    weight.order = order
    shuffled = Weight(weight.scheme, weight.q[:, order.argsort()], weight.scale)
    # The same 256 terms in another order: each of their sums is rounded once in fp32.
    bound = 256 * 2**-24 * float((x.abs() @ dequantize(weight, torch.float32).abs().T).max())
    difference = quantization.product(x, weight) - quantization.product(x, shuffled)
    assert difference.abs().max() <= bound
    with pytest.raises(BackendError, match="ordered by activation"):
        weight.columns(0, 128)


def test_what_cannot_be_written_is_said():
    with pytest.raises(BackendError, match="do not divide into groups of 128"):
        quantize(dense(k=192), SCHEMES["int4-g128"])
    with pytest.raises(BackendError, match="needs a calibrated scale"):
        quantize(dense(), Scheme("int8", activation="int8-tensor"))
    with pytest.raises(BackendError, match="there are int8, int8-w8a8"):
        quantization.named("int5")
    with pytest.raises(BackendError, match="different ways"):
        join([quantize(dense(), SCHEMES["int8"]), quantize(dense(), SCHEMES["fp8"])])


@given(st.integers(0, 2**31), st.floats(1e-30, 1e30))
@settings(max_examples=30, deadline=None)
def test_heads_of_an_int8_cache_are_rounded_by_their_own_largest_number(seed, size):
    heads = dense(seed, 6, 32) * size * torch.logspace(-3, 3, 6)[:, None]
    codes, scale = rounded_heads(heads.view(3, 2, 32))
    assert codes.dtype == torch.int8 and codes.shape == (3, 2, 32) and scale.shape == (3, 2)
    assert (codes.abs().amax(-1) == 127).all()
    number = head_numbers(codes, scale).view(6, 32)
    # Half a step, and the roundings of the scale, of the quotient and of the product.
    assert ((number - heads).abs() <= heads.abs().amax(-1, keepdim=True) / 127 * 0.5001).all()
    assert torch.equal(rounded_heads(-heads.view(3, 2, 32))[0], -codes)


def test_heads_of_zeros_and_heads_that_are_not_finite():
    heads = torch.ones(4, 8)
    heads[1] = 0.0
    heads[2, 3] = torch.nan
    heads[3, 3] = torch.inf
    codes, scale = rounded_heads(heads)
    assert torch.equal(head_numbers(codes, scale)[:2], heads[:2])
    assert scale[2].isnan() and scale[3] == torch.inf
    assert torch.equal(kept_heads(heads[:2], torch.int8), heads[:2])
    assert kept_heads(heads, torch.float8_e4m3fn).dtype == torch.float8_e4m3fn


SPARSE = Scheme(sparsity="2:4")


def pruned(x: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """x [N, K] with two numbers of each four, anywhere, set to 0."""
    generator = torch.Generator().manual_seed(seed)
    lost = torch.rand(x.numel() // 4, 4, generator=generator).argsort(1)[:, :2]
    return x.reshape(-1, 4).scatter(1, lost, 0.0).view(x.shape)


@given(
    st.integers(1, 5).flatmap(
        lambda n: st.lists(
            st.lists(st.sampled_from([-1.5, 0.0, 0.0, 2.0]), min_size=16, max_size=16), min_size=n, max_size=n
        )
    )
)
def test_a_compressed_weight_means_what_was_compressed(rows):
    x = torch.tensor(rows)
    fours = x.view(-1, 4)
    if bool(((fours != 0).sum(1) > 2).any()):
        with pytest.raises(BackendError, match="more than two are not 0"):
            quantization.compress(x)
        x = (fours * ((fours != 0).cumsum(1) <= 2)).view(x.shape)
    values, positions = quantization.compress(x)
    assert torch.equal(quantization.expand(values, positions), x)
    assert set(quantization.unpacked(positions).flatten().tolist()) <= set(quantization.PLACES)


def test_positions_by_hand():
    x = torch.tensor([[0.0, 5.0, 0.0, 7.0, 1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 3.0, 0.0, 0.0, 4.0, 8.0]])
    values, positions = quantization.compress(x)
    assert values.tolist() == [[5.0, 7.0, 1.0, 2.0], [0.0, 3.0, 4.0, 8.0]]
    assert positions.tolist() == [[0b0100_1101], [0b1110_1100]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_compressed_weight_takes_little_more_than_half(dtype):
    weight = quantize(pruned(dense(dtype=dtype)), SPARSE)
    assert weight.num_bytes == 256 * 256 * (dtype.itemsize / 2 + 1 / 8)
    assert (weight.n, weight.k) == (256, 256) and weight.spec("down").dtype == dtype
    if dtype != torch.float32:
        assert weight.num_bytes == 0.5625 * 256 * 256 * dtype.itemsize


def test_parts_of_a_compressed_weight_mean_the_parts_of_what_it_means():
    whole = pruned(dense())
    weight = quantize(whole, SPARSE)
    assert torch.equal(dequantize(weight, torch.float32), whole)
    for dim in (0, 1):
        parts = [weight.shard(dim, rank, 4) for rank in range(4)]
        assert torch.equal(torch.cat([dequantize(part, torch.float32) for part in parts], dim), whole)
        assert all(part.num_bytes == weight.num_bytes // 4 for part in parts)
        assert all(part.positions.is_contiguous() for part in parts)
    joined = join([weight.rows(0, 100), weight.rows(100, 256)])
    assert torch.equal(dequantize(joined, torch.float32), whole)
    with pytest.raises(BackendError, match="cut through a group of 8"):
        weight.columns(0, 12)


def test_what_is_not_two_of_four_is_not_compressed():
    with pytest.raises(BackendError, match="prune the weight to 2:4 first"):
        quantize(dense(), SPARSE)
    with pytest.raises(BackendError, match="252 input features do not divide into eights"):
        quantize(pruned(dense(k=252)), SPARSE)
    assert quantize(pruned(dense()), Scheme("int8", sparsity="2:4")).positions is None
