"""The sampler's noise: fixed for good, the same on host and device, and truly Gumbel."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from backbench.backends.noise import TOKEN_STRIDE, gumbel_noise, mix, noise_key

MASK = 0xFFFFFFFF


def test_keys_are_fixed_for_good() -> None:
    keys = [noise_key(seed, draw) for seed, draw in ((0, 0), (1, 0), (0, 1), (2**40, 7))]
    assert keys == [0, 1364076727, 1461123477, 239352166]
    assert mix(0) == 0
    assert mix(1) == 0x514E28B7


@given(st.integers(-(2**63), 2**63), st.integers(0, 2**31))
def test_keys_are_32_bits_and_depend_on_seed_and_draw(seed: int, draw: int) -> None:
    key = noise_key(seed, draw)
    assert 0 <= key <= MASK
    assert key != noise_key(seed, draw + 1)
    assert key != noise_key(seed + 1, draw)


@given(st.integers(0, MASK), st.integers(0, 200_000))
def test_the_device_computes_what_the_written_rule_says(key: int, token: int) -> None:
    noise = gumbel_noise(torch.tensor([key]), token + 1)[0, token]
    bits = mix(key ^ (token * TOKEN_STRIDE & MASK)) >> 9
    uniform = (bits + 0.5) * 2.0**-23
    # fp32 logarithms: a few units in the last place of a value of at most 17.
    assert abs(float(noise) - -math.log(-math.log(uniform))) < 1e-5


def test_moments_are_those_of_a_standard_gumbel() -> None:
    count = 400_000
    noise = gumbel_noise(torch.tensor([noise_key(3, 5)]), count)[0].double()
    assert torch.isfinite(noise).all()
    # Mean 0.5772 (Euler's constant), variance pi^2 / 6; five standard errors of each.
    variance = math.pi**2 / 6
    assert abs(float(noise.mean()) - 0.5772157) < 5 * math.sqrt(variance / count)
    fourth = 5.4 * variance**2
    assert abs(float(noise.var()) - variance) < 5 * math.sqrt((fourth - variance**2) / count)


def test_rows_of_different_keys_are_uncorrelated() -> None:
    keys = torch.tensor([noise_key(0, draw) for draw in range(8)])
    correlation = torch.corrcoef(gumbel_noise(keys, 100_000)) - torch.eye(8)
    # A correlation of independent rows has a standard error of 1 / sqrt(n).
    assert float(correlation.abs().max()) < 5 / math.sqrt(100_000)
