"""Rejection sampling against exact probabilities, alone and in the engine."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from engine_fixtures import open_small
from speculation_fixtures import PROPOSERS, open_speculating

from backbench.backends.interface import SamplingBatch
from backbench.backends.noise import gumbel_noise, noise_key
from backbench.engine.request import SamplingParams
from backbench.engine.speculation.rejection import probabilities, verify

VOCAB, DRAWS = 12, 40_000
CHI_SQUARED = 31.3
"""The 99.9 % quantile of chi squared with 11 degrees of freedom; seeds are fixed, so a pass stays one."""


def chi_squared(counts: torch.Tensor, expected: torch.Tensor) -> float:
    live = expected > 0
    assert counts[~live].sum() == 0, "a token that cannot be drawn was"
    wanted = expected[live] * counts.sum()
    return float(((counts[live] - wanted).square() / wanted).sum())


def keys(count: int, seed: int = 0) -> torch.Tensor:
    return torch.tensor([noise_key(seed, draw) for draw in range(count)])


@pytest.mark.parametrize("sure", [False, True], ids=["drawn from q", "sure of one token"])
def test_the_token_is_distributed_as_without_drafts(sure: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    p = torch.rand(VOCAB, generator=generator).square().softmax(0)
    p[3] = 0
    p /= p.sum()
    q = torch.rand(VOCAB, generator=generator).softmax(0)
    drawn = keys(DRAWS)
    # As a draft model draws: with the key that the target's own draw would have.
    drafted = torch.full((DRAWS,), 5) if sure else (q.log() + gumbel_noise(drawn, VOCAB)).argmax(-1)
    proposed = None if sure else q.expand(DRAWS, -1)
    tokens = verify(p.expand(DRAWS, -1), drafted, proposed, drawn)
    assert chi_squared(torch.bincount(tokens, minlength=VOCAB).double(), p.double()) < CHI_SQUARED
    accepted = float((tokens == drafted).double().mean())
    best = float(p[5]) if sure else float(torch.minimum(p, q).sum())
    assert accepted == pytest.approx(best, abs=0.01), "as often as any scheme can (Leviathan, theorem 3.5)"


def test_without_a_draft_it_is_the_plain_draw() -> None:
    p = torch.rand(50, VOCAB, generator=torch.Generator().manual_seed(2)).softmax(-1)
    tokens = verify(p, torch.full((50,), -1), None, keys(50))
    assert torch.equal(tokens, (p.log() + gumbel_noise(keys(50), VOCAB)).argmax(-1))


def test_a_coin_that_always_accepts_is_caught() -> None:
    """The distribution test can fail: drafts accepted whatever p says are q's, not p's."""
    p, q = torch.ones(VOCAB) / VOCAB, torch.arange(1.0, VOCAB + 1).softmax(0)
    drafted = (q.log() + gumbel_noise(keys(DRAWS), VOCAB)).argmax(-1)
    assert chi_squared(torch.bincount(drafted, minlength=VOCAB).double(), p.double()) > CHI_SQUARED


def test_probabilities_follow_temperature_and_filters() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
    sampling = SamplingBatch(
        temperature=torch.tensor([0.0, 1.0, 0.5]),
        top_k=torch.tensor([0, 2, 0], dtype=torch.int32),
        top_p=torch.ones(3),
        min_p=torch.zeros(3),
        noise_key=keys(3),
        all_greedy=False,
        any_filter=True,
    )
    found = probabilities(logits, sampling)
    assert found[0].tolist() == [1, 0, 0]
    torch.testing.assert_close(found[1], torch.tensor([0.7310586, 0.2689414, 0.0]))
    torch.testing.assert_close(found[2], torch.tensor([4.0, 2.0, 0.0]).softmax(0))


@pytest.mark.parametrize("proposer", [*PROPOSERS[:3], "eagle3 head"])
def test_in_the_engine_greedy_tokens_stay_and_sampled_ones_keep_their_distribution(proposer: str) -> None:
    prompt = [5, 9, 2] * 4
    greedy = SamplingParams(max_tokens=30, ignore_eos=True)
    rejection = open_speculating(proposer, speculation_sampling="rejection")
    assert (
        rejection.generate([prompt], greedy)[0].token_ids
        == open_small().generate([prompt], greedy)[0].token_ids
    )

    # The pairs of a sampled output's second and third tokens, of one sequence for each of many seeds.
    def pairs(engine: object, first: int, count: int) -> Counter[tuple[int, ...]]:
        found: Counter[tuple[int, ...]] = Counter()
        for start in range(first, first + count, 1000):
            params = SamplingParams(
                max_tokens=3, ignore_eos=True, temperature=1.0, top_k=2, n=1000, seed=start
            )
            done = engine.generate([prompt], params)  # type: ignore[attr-defined]
            found.update(tuple(one.token_ids) for one in done)
        return found

    count = 3000
    seen = pairs(open_speculating(proposer, speculation_sampling="rejection", max_seqs=64), 0, count)
    plain = pairs(open_small(max_seqs=64), 10**6, count)
    triples = sorted(seen.keys() | plain.keys())
    # Two samples of one distribution: sum (a - b)^2 / (a + b) is chi squared with cells - 1 degrees.
    statistic = sum((seen[t] - plain[t]) ** 2 / (seen[t] + plain[t]) for t in triples)
    assert len(triples) <= 8
    assert statistic < 24.4, "the 99.9 % quantile for at most 7 degrees of freedom"
