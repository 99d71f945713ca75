"""On two GPUs of one host: layers divided, captured and eager, give the tokens of one GPU."""

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

STAGES = 2
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < STAGES, reason="needs two CUDA or ROCm devices"),
]


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    found = Team(STAGES, detect())
    yield found
    found.close()


def tokens(params: SamplingParams, pp: int, team: Team, graphs: bool) -> list[list[int]]:
    config = EngineConfig(max_seqs=16, max_step_tokens=512, num_blocks=256, max_len=512, graphs=graphs, pp=pp)
    source = find_model("tiny")
    with Engine.open(
        source, backend="triton", device=detect(), dtype=torch.float32, config=config, team=team
    ) as engine:
        engine.warm_up(params)
        done = engine.generate(prompts(source.config.vocab_size), params)
        assert not graphs or engine.runner.graph_misses == 0
        if pp > 1:
            rows = engine.memory_by_device()
            assert len({row["device"] for row in rows}) == len({row["layers"] for row in rows}) == pp
            assert all((row["graphs"] > 0) is graphs for row in rows)
        return [each.token_ids for each in done]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_tokens_of_one_gpu(team: Team, temperature: float) -> None:
    params = SamplingParams(max_tokens=32, temperature=temperature, ignore_eos=True)
    one = tokens(params, 1, team, graphs=True)
    for graphs in (True, False):
        assert tokens(params, STAGES, team, graphs) == one, graphs
