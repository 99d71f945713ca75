"""On two GPUs of one host: graphs and either collectives give the tokens of one GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from parallel_fixtures import prompts

from backbench.backends.interface.device import detect
from backbench.engine.config import EngineConfig
from backbench.engine.engine import Engine
from backbench.engine.models.checkpoint import find_model
from backbench.engine.parallel.team import Team
from backbench.engine.request import SamplingParams
from backbench.harness.kernels.collectives import conform_on

WORLD = 2
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < WORLD, reason="needs two CUDA or ROCm devices"),
]


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    found = Team(WORLD, detect())
    yield found
    found.close()


def tokens(params: SamplingParams, tp: int, team: Team, collectives: str | None, graphs: bool) -> list:
    config = EngineConfig(max_seqs=16, max_step_tokens=512, num_blocks=256, max_len=512, graphs=graphs, tp=tp)
    overrides = {} if collectives is None else {"collectives": collectives}
    source = find_model("tiny")
    with Engine.open(
        source,
        backend="triton",
        device=detect(),
        dtype=torch.float32,
        config=config,
        overrides=overrides,
        team=team,
    ) as engine:
        engine.warm_up(params)
        done = engine.generate(prompts(source.config.vocab_size), params)
        assert not graphs or engine.runner.graph_misses == 0
        return [each.token_ids for each in done]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_tokens_of_one_gpu(team: Team, temperature: float) -> None:
    params = SamplingParams(max_tokens=32, temperature=temperature, ignore_eos=True)
    one = tokens(params, 1, team, None, graphs=True)
    for collectives in ("torch", "triton"):
        for graphs in (True, False):
            assert tokens(params, WORLD, team, collectives, graphs) == one, (collectives, graphs)


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_collectives_are_right_on_every_rank(team: Team, name: str) -> None:
    for rows in team.call(conform_on, name, "full", (torch.bfloat16, torch.float16, torch.float32)):
        assert not [row for row in rows if row.status == "wrong"]
        assert sum(row.status == "pass" for row in rows) > 20
