"""Engines over two and four processes give the tokens of one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from parallel_fixtures import (
    BASE,
    DRAFTING,
    MODELS,
    LoudSource,
    WrongShardSource,
    answers,
    open_on,
    prompts,
    traffic,
)

from backbench.backends.interface.device import cpu
from backbench.backends.quantization import SCHEMES
from backbench.engine.models.checkpoint import find_model
from backbench.engine.models.on_the_fly import OnTheFly
from backbench.engine.parallel.team import Team
from backbench.engine.request import SamplingParams
from backbench.errors import BackendError
from backbench.harness import correctness


@pytest.fixture(scope="module", params=[2, 4])
def team(request: pytest.FixtureRequest) -> Iterator[Team]:
    """Started once: that takes longer than all that is done in it."""
    found = Team(request.param, cpu())
    yield found
    found.close()


def test_tokens_are_those_of_one_process(team: Team) -> None:
    """In fp32, greedy and sampled; log-probabilities differ by the order of sums alone."""
    for name, model in MODELS.items():
        source = LoudSource(model)
        with open_on(source, 1) as one, open_on(source, team.world, team) as several:
            for (tokens, logprobs), (own, own_logprobs) in zip(answers(one), answers(several), strict=True):
                assert own == tokens, name
                torch.testing.assert_close(torch.tensor(own_logprobs), torch.tensor(logprobs), msg=name)


def test_traffic_under_pressure(team: Team) -> None:
    """Preemption, forks, prefix hits, aborts and large table updates: every step reaches every rank whole."""
    source, limits = LoudSource(BASE), {"num_blocks": 40, "max_seqs": 4}
    with open_on(source, 1, **limits) as one, open_on(source, team.world, team, **limits) as several:
        for seed in range(3):
            assert traffic(several, seed) == traffic(one, seed), seed
        assert one.scheduler.preemptions == several.scheduler.preemptions > 0


def test_drafts_and_beams_reach_every_rank(team: Team) -> None:
    """Steps that verify several tokens, and those whose candidates are asked for: one process's tokens."""
    source = LoudSource(BASE)
    repeating = [[1, 2, 3, 4] * 8, [5, 6] * 9, [7] * 20]
    greedy, search = (
        SamplingParams(max_tokens=24),
        SamplingParams(max_tokens=9, beams=3, n=3, ignore_eos=True),
    )
    drafting = {"speculate": "ngram:3", "adaptive_drafts": False, "overlap": False}
    with (
        open_on(source, 1) as one,
        open_on(source, team.world, team, **drafting) as several,
    ):
        plain = [each.token_ids for each in one.generate(repeating, greedy)]
        assert [each.token_ids for each in several.generate(repeating, greedy)] == plain
        assert sum(sum(step.accepted_lengths) for step in several.take_step_stats()) > 0
        found = [each.token_ids for each in one.generate(repeating, search)]
    with open_on(source, team.world, team) as several:
        assert [each.token_ids for each in several.generate(repeating, search)] == found


def test_a_model_that_drafts_lies_on_the_first_device_alone(team: Team) -> None:
    """The others only verify what it drafted."""
    source = find_model("tiny")
    texts = [[(7 * i + 13 * salt) % 500 for i in range(length)] for salt, length in enumerate((3, 30, 70))]
    kinds = (
        SamplingParams(max_tokens=16, ignore_eos=True),
        SamplingParams(max_tokens=12, temperature=0.7, top_p=0.9, seed=4, n=2, ignore_eos=True),
    )
    overrides = {"collectives": "torch"}  # which mean nothing to the model that drafts
    with (
        open_on(source, 1) as one,
        open_on(source, team.world, team, overrides=overrides, **DRAFTING) as several,
    ):
        for params in kinds:
            plain = [each.token_ids for each in one.generate(texts, params)]
            assert [each.token_ids for each in several.generate(texts, params)] == plain
        assert sum(sum(step.accepted_lengths) for step in several.take_step_stats()) > 0
        assert several.speculator is not None
        held, per_block = several.speculator.proposer.memory()
        first, *others = several.memory_by_device()
        for other in others:
            assert first["weights_bytes"] - other["weights_bytes"] == held > 0
            assert first["kv_pool_bytes"] - other["kv_pool_bytes"] == per_block * several.pool.num_blocks > 0
        assert first["weights_bytes"] == several.memory()["weights_bytes"]


def test_traffic_under_pressure_while_one_device_drafts(team: Team) -> None:
    """Preemptions, forks, prefix hits and aborts leave both models' caches right."""
    source, limits = find_model("tiny"), {"num_blocks": 26, "max_seqs": 4}
    with (
        open_on(source, 1, **limits) as one,
        open_on(source, team.world, team, **limits, **DRAFTING) as several,
    ):
        plain, drafted = traffic(one, 1, 12), traffic(several, 1, 12)
        assert several.scheduler.preemptions > 0
    for key, tokens in plain.items():
        if int(key[0]) % 7 == 6:  # aborted: how far it came depends on the tokens of a step
            shared = min(len(tokens), len(drafted.get(key, [])))
            assert drafted.get(key, [])[:shared] == tokens[:shared]
        else:
            assert drafted[key] == tokens


def test_the_pool_fits_beside_the_model_that_drafts(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first device holds fewest blocks; 1 MiB is given to this process alone."""
    monkeypatch.setattr("backbench.engine.limits.CPU_POOL_BYTES", 2**20)
    with open_on(find_model("tiny"), team.world, team, **DRAFTING) as engine:
        assert engine.speculator is not None
        own, drafting = engine.decoder.cache_bytes_per_block(), engine.speculator.proposer.memory()[1]
        assert engine.pool.num_blocks == 2**20 // (own + drafting) < 2**20 // own
        first, *others = engine.memory_by_device()
        assert first["kv_pool_bytes"] <= 2**20
        assert {other["kv_pool_bytes"] for other in others} == {own * engine.pool.num_blocks}


def test_scales_of_an_int8_cache_are_divided_with_their_heads(team: Team) -> None:
    source, greedy = LoudSource(BASE), SamplingParams(max_tokens=12, ignore_eos=True)
    given, kept = prompts(BASE.vocab_size), {"kv_dtype": "int8", "num_blocks": 64}
    with open_on(source, 1, **kept) as one, open_on(source, team.world, team, **kept) as several:
        expected = [each.token_ids for each in one.generate(given, greedy)]
        assert [each.token_ids for each in several.generate(given, greedy)] == expected
        whole, rows = one.memory()["kv_pool_bytes"], several.memory_by_device()
    # One of two KV heads.
    assert {row["kv_pool_bytes"] for row in rows} == {whole // 2}


def test_what_each_device_holds(team: Team) -> None:
    with open_on(LoudSource(BASE), 1) as one:
        whole = one.memory()["weights_bytes"]
    with open_on(LoudSource(BASE), team.world, team) as several:
        rows = several.memory_by_device()
    assert [row["device"] for row in rows] == ["cpu"] * team.world
    assert len({row["weights_bytes"] for row in rows}) == 1
    # Its share of everything but norms; and 64 rows of a vocabulary of 97, and one of two KV heads.
    assert whole / team.world < rows[0]["weights_bytes"] < 2 * whole / team.world


def test_a_wrong_shard_is_caught_by_the_check_of_results(team: Team) -> None:
    right = correctness.check(open_on(LoudSource(BASE), team.world, team), LoudSource(BASE))
    assert right["passed"], right.get("reason")
    wrong = correctness.check(open_on(WrongShardSource(BASE), team.world, team), LoudSource(BASE))
    assert wrong["passed"] is False
    assert "log-probabilities differ" in wrong["reason"]


@pytest.mark.parametrize("scheme", ["fp8", "int8-w8a8"])
def test_rows_that_each_device_rounds_for_itself_are_checked(team: Team, scheme: str) -> None:
    model = replace(BASE, on_the_fly=OnTheFly(SCHEMES[scheme]))
    right = correctness.check(open_on(LoudSource(model), team.world, team), LoudSource(model))
    assert right["passed"] is True, right.get("reason")
    wrong = correctness.check(open_on(WrongShardSource(model), team.world, team), LoudSource(model))
    assert wrong["passed"] is False
    assert "log-probabilities differ" in wrong["reason"]


def test_what_cannot_be_divided_is_refused_before_any_process_starts() -> None:
    with pytest.raises(BackendError, match="8 query heads and 2 KV heads cannot be divided among 3 devices"):
        open_on(LoudSource(BASE), 3)
