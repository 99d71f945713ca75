"""The torch operations against independent formulas, and sampling against the distribution it claims."""

from __future__ import annotations

import math

import pytest
import torch

from backbench.backends.interface import (
    AttentionSpec,
    Rotary,
    Rotation,
    SamplingBatch,
    Scheme,
    Weight,
)
from backbench.backends.interface.device import cpu
from backbench.backends.noise import noise_key
from backbench.backends.torch import BACKEND

OPERATIONS = BACKEND.operations


def sampling(temperature, top_k=0, top_p=1.0, min_p=0.0, draws=None, rows=None):
    """One row of parameters, or `rows` equal ones with different noise keys."""
    rows = rows or len(temperature)
    full = lambda value, dtype: torch.as_tensor(value, dtype=dtype).expand(rows).clone()  # noqa: E731
    keys = torch.tensor([noise_key(7, draw) for draw in (draws or range(rows))])
    batch = SamplingBatch(
        full(temperature, torch.float32),
        full(top_k, torch.int32),
        full(top_p, torch.float32),
        full(min_p, torch.float32),
        keys,
    )
    batch.all_greedy = not bool(batch.temperature.any())
    batch.any_filter = True
    return batch


def support(probabilities, rows=2000, **filters):
    """The set of tokens that sampling from `probabilities` ever returns."""
    logits = torch.tensor(probabilities).log().expand(rows, -1)
    return set(OPERATIONS.sample(logits, sampling(1.0, rows=rows, **filters)).tolist())


def test_rms_norm_and_residual():
    x, residual, weight = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)
    normed, total = OPERATIONS.add_rms_norm(x, residual, weight, 1e-6)
    expected = (x + residual).double()
    expected = expected / (expected.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    torch.testing.assert_close(total, x + residual)
    torch.testing.assert_close(normed.double(), expected, atol=1e-6, rtol=1e-6)


def test_the_norm_of_small_values_is_held_down_by_eps():
    """Of nothing it is nothing, and of values as small as sqrt(eps) it is theirs over sqrt(2 eps)."""
    weight = torch.ones(8)
    assert torch.equal(OPERATIONS.rms_norm(torch.zeros(2, 8), weight, 1e-6), torch.zeros(2, 8))
    small = torch.full((1, 8), 1e-3)
    torch.testing.assert_close(OPERATIONS.rms_norm(small, weight, 1e-6), torch.full((1, 8), 0.5**0.5))


def test_gate():
    gate_up = torch.randn(3, 10)
    gate, up = gate_up[:, :5], gate_up[:, 5:]
    torch.testing.assert_close(OPERATIONS.gate(gate_up), gate / (1 + torch.exp(-gate)) * up)


def test_embed():
    table = torch.randn(9, 4)
    assert torch.equal(OPERATIONS.embed(torch.tensor([3, 3, 8]), table), table[[3, 3, 8]])


@pytest.mark.parametrize("rotary_dim", [8, 4])
def test_rotate_turns_each_pair_by_its_angle(rotary_dim):
    """Complex multiplication by e^(i angle) of pairs (j, j + r/2), and dimensions past r left alone."""
    spec = AttentionSpec(2, 1, 8, torch.float32, torch.float32, 16, 1.0)
    angles = torch.arange(20)[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001])[: rotary_dim // 2]
    rotary = Rotary(torch.cat([angles.cos(), angles.sin()], -1), rotary_dim)
    qkv, positions = torch.randn(3, 32), torch.tensor([0, 7, 19])
    q, k, v = OPERATIONS.rotate(qkv, positions, Rotation(rotary), spec)
    heads = qkv.view(3, 4, 8)
    half = rotary_dim // 2
    turned = torch.complex(heads[..., :half], heads[..., half:rotary_dim])
    turned = turned * torch.polar(torch.ones(3, half), angles[positions])[:, None]
    expected = torch.cat([turned.real, turned.imag, heads[..., rotary_dim:]], -1)
    torch.testing.assert_close(torch.cat([q, k], 1), expected[:, :3])
    assert torch.equal(v, heads[:, 3:])


def test_rotate_norms_before_it_rotates():
    spec = AttentionSpec(2, 1, 8, torch.float32, torch.float32, 16, 1.0)
    rotary = Rotary(torch.tensor([[0.0] * 4 + [1.0] * 4]), 8)
    qkv, q_weight, k_weight = torch.randn(1, 32), torch.randn(8), torch.randn(8)
    rotation = Rotation(rotary, q_weight, k_weight, 1e-6)
    q, k, _ = OPERATIONS.rotate(qkv, torch.zeros(1).long(), rotation, spec)
    heads = qkv.view(1, 4, 8)
    quarter = lambda x: torch.cat([-x[..., 4:], x[..., :4]], -1)  # noqa: E731
    torch.testing.assert_close(q, quarter(OPERATIONS.rms_norm(heads[:, :2], q_weight, 1e-6)))
    torch.testing.assert_close(k, quarter(OPERATIONS.rms_norm(heads[:, 2:3], k_weight, 1e-6)))


def test_greedy_takes_the_first_maximum():
    logits = torch.tensor([[0.0, 3.0, 3.0], [5.0, 5.0, 1.0]])
    assert OPERATIONS.sample(logits, sampling([0.0, 0.0])).tolist() == [1, 0]


def test_greedy_rows_beside_drawn_ones_take_the_maximum():
    logits = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    batch = sampling([0.0, 5.0] * 20)
    tokens = OPERATIONS.sample(logits, batch)
    assert torch.equal(tokens[::2], logits[::2].argmax(-1))
    assert not torch.equal(tokens[1::2], logits[1::2].argmax(-1))


def test_filters_keep_what_they_should():
    probabilities = [0.4, 0.3, 0.15, 0.1, 0.05]
    assert support(probabilities) == {0, 1, 2, 3, 4}
    assert support(probabilities, top_k=2) == {0, 1}
    assert support(probabilities, top_k=99) == {0, 1, 2, 3, 4}
    assert support(probabilities, top_p=0.5) == {0, 1}
    assert support(probabilities, top_p=0.01) == {0}
    assert support(probabilities, min_p=0.3) == {0, 1, 2}
    # Top-p looks at the renormalised survivors of top-k: 0.4 / 0.7 = 0.57 reaches 0.55 alone.
    assert support(probabilities, top_k=2, top_p=0.55) == {0}


def test_ties_with_the_threshold_stay():
    assert support([0.2, 0.4, 0.2, 0.2], top_k=2) == {0, 1, 2, 3}
    assert support([0.2, 0.4, 0.2, 0.2], top_p=0.5) == {0, 1, 2, 3}


def test_draws_follow_the_softmax():
    rows, probabilities = 20_000, torch.tensor([0.5, 0.25, 0.125, 0.125])
    logits = (probabilities.log() * 0.7).expand(rows, -1)
    counts = OPERATIONS.sample(logits, sampling(0.7, rows=rows)).bincount(minlength=4)
    chi_square = ((counts - rows * probabilities) ** 2 / (rows * probabilities)).sum().item()
    assert chi_square < 16.3  # the 99.9 % point for 3 degrees of freedom; the draws are fixed


def test_a_row_draws_the_same_in_any_company():
    logits = torch.randn(4, 50)
    batch = sampling([0.0, 0.8, 0.0, 1.2], top_k=5)
    together = OPERATIONS.sample(logits, batch)
    for row in range(4):
        alone = sampling([float(batch.temperature[row])], top_k=5, draws=[row])
        assert OPERATIONS.sample(logits[row : row + 1], alone).item() == together[row].item()
    assert together[0] == logits[0].argmax() and together[2] == logits[2].argmax()


def test_a_dense_product_adds_its_bias():
    linear, weight = BACKEND.linear, torch.randn(6, 4)
    x, bias = torch.randn(3, 4), torch.randn(6)
    packed = linear.pack(Weight(Scheme(), weight), cpu())
    torch.testing.assert_close(linear.run(x, packed, bias), x @ weight.T + bias)


def test_min_p_is_relative_to_the_most_likely():
    assert math.isclose(0.15 / 0.4, 0.375)
    assert support([0.4, 0.3, 0.15, 0.15], min_p=0.38) == {0, 1}
