"""On a GPU: graphs, overlap and the Triton backend change nothing about the tokens."""

from __future__ import annotations

import random

import pytest
import torch

from backbench.backends.interface.device import detect
from backbench.engine.config import EngineConfig
from backbench.engine.engine import Engine
from backbench.engine.models.checkpoint import find_model
from backbench.engine.request import SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]

GREEDY = SamplingParams(max_tokens=48, ignore_eos=True)
SEEDED = SamplingParams(max_tokens=48, ignore_eos=True, temperature=0.8, top_k=50, top_p=0.9, seed=3)


def prompts() -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(1, 4096) for _ in range(rng.randint(1, 300))] for _ in range(12)]


def tokens(
    backend: str, params: SamplingParams, dtype: torch.dtype = torch.float32, **settings: object
) -> list:
    config = EngineConfig(**({"max_seqs": 16, "max_step_tokens": 512, "num_blocks": 2048} | settings))  # type: ignore[arg-type]
    engine = Engine.open(find_model("tiny"), backend=backend, device=detect(), dtype=dtype, config=config)
    engine.warm_up(params)
    done = engine.generate(prompts(), params)
    stats = engine.take_step_stats()
    if config.graphs and backend == "triton":
        assert {step.num_prefill_tokens > 0 for step in stats if step.graph} == {True, False}
        assert engine.runner.graph_misses == 0
    assert engine.pool.num_used == 0
    return [completion.token_ids for completion in done]


@pytest.fixture(scope="module", params=[GREEDY, SEEDED], ids=["greedy", "seeded"])
def params(request: pytest.FixtureRequest) -> SamplingParams:
    return request.param


@pytest.fixture(scope="module")
def reference(params: SamplingParams) -> list:
    return tokens("torch", params, overlap=False)


def test_triton_equals_torch_in_fp32(params: SamplingParams, reference: list) -> None:
    assert tokens("triton", params) == reference


@pytest.mark.parametrize(
    "settings",
    [{"graphs": False}, {"overlap": False}, {"graphs": False, "overlap": False}, {"num_blocks": 60}],
    ids=str,
)
def test_captured_equals_eager_and_overlap_changes_nothing(
    params: SamplingParams, reference: list, settings: dict
) -> None:
    assert tokens("triton", params, **settings) == reference


def test_torch_with_overlap(params: SamplingParams, reference: list) -> None:
    assert tokens("torch", params) == reference
