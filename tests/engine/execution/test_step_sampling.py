"""What a step's buffers tell the sampler, seen in the tokens: which filters hold, and which noise."""

from __future__ import annotations

import pytest
from engine_fixtures import open_small

from backbench.engine.request import SamplingParams

PROMPT = [(7 * place) % 97 for place in range(9)]
UNIFORM = 1e6
"""A temperature at which all tokens are as likely as each other: the noise alone decides."""


def generate(**params: object) -> list[int]:
    settings = SamplingParams(**{"max_tokens": 16} | params)  # type: ignore[arg-type]
    (completion,) = open_small(num_blocks=32).generate([PROMPT], settings)
    return list(completion.token_ids)


@pytest.mark.parametrize("alone", [{"min_p": 0.999999}, {"top_k": 1}, {"top_p": 1e-6}])
def test_a_filter_alone_that_leaves_one_token_is_greedy(alone: dict[str, float]) -> None:
    """Temperature 50 draws anything, were the filter forgotten because the others are off."""
    greedy = generate()
    assert generate(temperature=50.0, seed=3) != greedy
    assert generate(temperature=50.0, seed=3, **alone) == greedy


def test_each_draw_has_its_own_noise() -> None:
    assert len(set(generate(temperature=UNIFORM))) > 8


def test_each_seed_has_its_own_noise_and_keeps_it() -> None:
    draws = [generate(temperature=UNIFORM, seed=seed) for seed in (0, 1, 0)]
    assert draws[0] == draws[2] != draws[1]
