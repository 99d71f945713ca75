"""Tokens of quantized weights depend on the request alone: not on company, chunks, preemption or hits.

In fp32, and as greedy choices: sums that a library orders otherwise for another number of rows differ in
their last bits only. Schemes that round rows as well (int8-w8a8, fp8) are left out: where such a bit decides
a code, what follows differs by more than bits, with any backend and also in another batch.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from backbench.backends.interface.device import cpu
from backbench.engine.config import EngineConfig
from backbench.engine.engine import Engine
from backbench.engine.models.checkpoint import find_model
from backbench.engine.request import SamplingParams

SCHEMES = ("int8", "int4-g128", "nvfp4")
PARAMS = SamplingParams(max_tokens=16, ignore_eos=True)
GENERATOR = torch.Generator().manual_seed(4)
PROMPTS = [torch.randint(0, 4096, (length,), generator=GENERATOR).tolist() for length in (5, 30, 18, 26)]


def opened(scheme: str, **settings) -> Engine:
    sizes = {"max_seqs": 8, "block_size": 8, "num_blocks": 32, "max_len": 128} | settings
    config = EngineConfig(quantize=scheme, quantize_head=True, **sizes)
    return Engine.open(find_model("tiny"), backend="torch", device=cpu(), config=config)


def tokens(engine: Engine, prompts=PROMPTS) -> list[list[int]]:
    return [done.token_ids for done in engine.generate(prompts, PARAMS)]


@cache
def alone(scheme: str) -> list[list[int]]:
    engine = opened(scheme, prefix_cache=False)
    return [tokens(engine, [prompt])[0] for prompt in PROMPTS]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_company_and_chunks(scheme: str) -> None:
    assert tokens(opened(scheme)) == alone(scheme)
    assert tokens(opened(scheme, max_step_tokens=24, prefill_chunk=11)) == alone(scheme)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_preemption_and_prefix_hits(scheme: str) -> None:
    tight = opened(scheme, num_blocks=15, prefix_cache=False)
    assert tokens(tight) == alone(scheme)
    assert tight.scheduler.preemptions > 0
    caching = opened(scheme)
    assert tokens(caching) == tokens(caching) == alone(scheme)
    assert sum(step.prefix_hit_tokens for step in caching.take_step_stats()) > 0


def test_schemes_are_told_apart() -> None:
    """The tests above would pass were no weight rounded."""
    assert len({str(alone(scheme)) for scheme in (*SCHEMES, "none")}) > 2


def test_an_fp8_cache_holds_half_of_bf16_and_changes_little() -> None:
    """Rounded keys and values move the choice of a token here and there, whatever the company."""
    sizes = {"max_seqs": 8, "block_size": 8, "num_blocks": 32, "max_len": 128, "prefix_cache": False}
    made = []
    for kv_dtype in (None, "fp8"):
        config = EngineConfig(kv_dtype=kv_dtype, **sizes)
        engine = Engine.open(
            find_model("tiny"), backend="torch", device=cpu(), dtype=torch.bfloat16, config=config
        )
        made.append((engine.memory()["kv_pool_bytes"], engine.decoder.kv_dtype))
    assert made == [(2 * made[1][0], torch.bfloat16), (made[1][0], torch.float8_e4m3fn)]
    config = EngineConfig(kv_dtype="fp8", **sizes)
    engine = Engine.open(find_model("tiny"), backend="torch", device=cpu(), config=config)
    together = tokens(engine)
    assert [tokens(engine, [prompt])[0] for prompt in PROMPTS] == together
    assert together != alone("none")
