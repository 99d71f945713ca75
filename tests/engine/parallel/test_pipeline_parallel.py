"""Engines whose layers are divided among two and three processes give the tokens of one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_fixtures import WordTokenizer, open_small
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from late_device import make_late
from parallel_fixtures import (
    BASE,
    KINDS,
    MODELS,
    LoudSource,
    WrongStageSource,
    answers,
    in_stages,
    open_on,
    prompts,
    traffic,
)
from traffic import engines, serve

from backbench.backends.interface.device import cpu
from backbench.engine.config import EngineConfig
from backbench.engine.models.config import ModelConfig
from backbench.engine.models.layers import ALL_LAYERS, Stage
from backbench.engine.parallel.pipe import stage_of
from backbench.engine.parallel.team import Team
from backbench.engine.request import SamplingParams
from backbench.errors import BackbenchError, BackendError, EngineError
from backbench.harness import correctness


def deeper(model: ModelConfig) -> ModelConfig:
    """The model with four layers, whose windows are not those of a stage's neighbours."""
    return replace(model, num_layers=4, windows=(None, 40, None, None))


DEEP = deeper(BASE)


@pytest.fixture(scope="module", params=[2, 3])
def team(request: pytest.FixtureRequest) -> Iterator[Team]:
    """Started once: that takes longer than all that is done in it."""
    found = Team(request.param, cpu())
    yield found
    found.close()


def test_one_step_at_a_time_gives_the_bits_of_one_process(team: Team) -> None:
    """In fp32, greedy and sampled: the same sums in the same order."""
    for name, model in MODELS.items():
        source = LoudSource(deeper(model))
        with open_on(source, 1) as one, in_stages(source, team.world, team, overlap=False) as several:
            assert answers(several) == answers(one), name


def test_micro_batches_give_the_tokens_of_one_process(team: Team) -> None:
    """Of models that round no rows. Fewer rows are summed in another order; where rows are rounded, a hair
    makes another code: one process that serves such prompts singly differs from itself as well."""
    for name in ("GQA 4, window, odd vocabulary", "GQA 1, tied", "int4, tied, head too"):
        source = LoudSource(deeper(MODELS[name]))
        with open_on(source, 1) as one, in_stages(source, team.world, team) as several:
            for (tokens, logprobs), (own, own_logprobs) in zip(answers(one), answers(several), strict=True):
                assert own == tokens, name
                torch.testing.assert_close(torch.tensor(own_logprobs), torch.tensor(logprobs), msg=name)


@pytest.mark.parametrize(
    "limits",
    [
        {"num_blocks": 40, "max_seqs": 4},
        {"num_blocks": 40, "max_seqs": 6, "max_step_tokens": 16, "prefill_chunk": 7},
        {"overlap": False},
    ],
    ids=str,
)
def test_traffic_under_pressure(team: Team, limits: dict[str, Any]) -> None:
    """Preemption, forks, prefix hits, chunks, aborts and large table updates: every stage has every step."""
    source = LoudSource(DEEP)
    with open_on(source, 1, **limits) as one, in_stages(source, team.world, team, **limits) as several:
        assert several.max_steps_in_flight == (1 if limits.get("overlap") is False else team.world)
        for seed in range(2):
            found, expected = traffic(several, seed), traffic(one, seed)
            for (request_id, index), tokens in (found | expected).items():
                own, others = found.get((request_id, index), []), expected.get((request_id, index), [])
                if int(request_id) % 7 == 6:  # aborted while another number of tokens was there
                    most = min(len(own), len(others))
                    own, others = own[:most], others[:most]
                assert own == others, (seed, request_id, tokens)
        assert several.scheduler.preemptions > 0 or "num_blocks" not in limits
        assert several.pool.num_used == 0


def test_as_many_steps_as_stages_divide_the_sequences(team: Team) -> None:
    """Once all prompts are computed, each step has a share, and no sequence is in two."""
    with in_stages(LoudSource(DEEP), team.world, team) as engine:
        for number in range(6):
            params = SamplingParams(max_tokens=12, ignore_eos=True)
            engine.add_request(str(number), [number + 1, 2, 3], params)
        shares = set()
        while engine.has_work:
            engine.step()
            flying = [{part.sequence for part in each.step.plan.slices} for each in engine._in_flight]
            assert len(flying) < team.world
            assert len(set().union(*flying)) == sum(map(len, flying))
            shares |= {step.num_decodes for step in engine.take_step_stats() if step.running == 6}
        assert shares - {0} == {6 // team.world}


def test_beams_and_log_probabilities(team: Team) -> None:
    search = SamplingParams(max_tokens=9, beams=3, n=3, ignore_eos=True)
    source = LoudSource(DEEP)
    with open_on(source, 1) as one, in_stages(source, team.world, team) as several:
        found = [each.token_ids for each in several.generate(prompts(97), search)]
        assert found == [each.token_ids for each in one.generate(prompts(97), search)]


def test_what_each_device_holds(team: Team) -> None:
    with open_on(LoudSource(DEEP), 1) as one:
        whole, per_block = one.memory()["weights_bytes"], one.decoder.cache_bytes_per_block()
    with in_stages(LoudSource(DEEP), team.world, team, num_blocks=50) as several:
        rows = several.memory_by_device()
    # The first rank is the last stage.
    layers = {2: ["2-3", "0-1"], 3: ["3-3", "0-0", "1-2"]}[team.world]
    assert [row["layers"] for row in rows] == layers
    assert sum(row["weights_bytes"] for row in rows) == whole
    assert sum(row["kv_pool_bytes"] for row in rows) == 50 * per_block
    assert max(row["weights_bytes"] for row in rows) < 0.6 * whole


def test_a_wrong_stage_is_caught_by_the_check_of_results(team: Team) -> None:
    right = correctness.check(in_stages(LoudSource(DEEP), team.world, team), LoudSource(DEEP))
    assert right["passed"], right.get("reason")
    wrong = correctness.check(in_stages(WrongStageSource(DEEP), team.world, team), LoudSource(DEEP))
    assert wrong["passed"] is False
    assert "log-probabilities differ" in wrong["reason"]


def test_an_engine_closed_with_steps_in_flight(team: Team) -> None:
    engine = in_stages(LoudSource(DEEP), team.world, team)
    for number in range(4):
        engine.add_request(str(number), prompts(97)[1], KINDS[0])
    for _ in range(2):  # all prompts, then a share of the decodes
        engine.step()
    assert engine._in_flight
    assert len(engine.memory_by_device()) == team.world
    engine.close()


@pytest.mark.parametrize("shares", [2, 3])
def test_shares_of_sequences_equal_the_same_served_alone(shares: int) -> None:
    """Random traffic of every kind on one late device, scheduled as a pipeline's steps are."""

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(engines(), st.data())
    def run(setting: dict[str, Any], data: st.DataObject) -> None:
        engine = make_late(open_small(tokenizer=WordTokenizer(), **setting))
        engine.max_steps_in_flight = engine.scheduler.shares = shares
        for asked in serve(engine, data):
            asked.check()
        assert engine.pool.num_used == 0

    run()


@pytest.mark.parametrize(
    ("asked", "error", "said"),
    [
        ({"pp": 5}, BackendError, "4 layers cannot be divided among 5 stages; use a lower --pp."),
        ({"pp": 2, "tp": 2}, EngineError, "--tp and --pp divide a model in two ways; give one of them."),
        ({"pp": 2, "speculate": "ngram:3"}, EngineError, "--speculate and --pp do not go together"),
        ({"pp": 9}, EngineError, "--pp must be at least 1 and at most 8, not 9"),
    ],
)
def test_mistakes(asked: dict[str, Any], error: type[BackbenchError], said: str) -> None:
    with pytest.raises(error, match=said):
        open_on(LoudSource(DEEP), 1, **asked)


def test_how_many_devices() -> None:
    assert [EngineConfig(**asked).num_devices for asked in ({}, {"tp": 4}, {"pp": 3})] == [1, 4, 3]


def test_the_first_rank_is_the_last_stage() -> None:
    assert [stage_of(rank, 3) for rank in range(3)] == [Stage(2, 3), Stage(0, 3), Stage(1, 3)]
    assert stage_of(0, 1) == ALL_LAYERS
