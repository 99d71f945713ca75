"""Tokens of quantized weights depend on the request alone: not on company, chunks, preemption or hits.

In fp32, and as greedy choices: sums that a library orders otherwise for another number of rows differ in
their last bits only. Schemes that round rows as well (int8-w8a8, fp8) are left out: where such a bit decides
a code, what follows differs by more than bits, with any backend and also in another batch.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from engine_fixtures import SmallSource, WordTokenizer

from backbench.backends.interface.device import cpu
from backbench.engine.config import EngineConfig
from backbench.engine.engine import Engine
from backbench.engine.models.checkpoint import find_model
from backbench.engine.request import SamplingParams

SCHEMES = ("int8", "int4-g128", "nvfp4")
PARAMS = SamplingParams(max_tokens=16, ignore_eos=True)
GENERATOR = torch.Generator().manual_seed(4)
PROMPTS = [torch.randint(0, 4096, (length,), generator=GENERATOR).tolist() for length in (5, 30, 18, 26)]


def opened(scheme: str, tokenizer=None, **settings) -> Engine:
    sizes = {"max_seqs": 8, "block_size": 8, "num_blocks": 32, "max_len": 128} | settings
    config = EngineConfig(**{"quantize": scheme, "quantize_head": True} | sizes)
    return Engine.open(find_model("tiny"), backend="torch", device=cpu(), config=config, tokenizer=tokenizer)


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


@pytest.mark.parametrize(
    ("kept", "dtype", "share"), [("fp8", torch.float8_e4m3fn, 64 / 128), ("int8", torch.int8, 68 / 128)]
)
def test_a_cache_of_bytes_holds_its_share_of_bf16_and_changes_little(
    kept: str, dtype: torch.dtype, share: float
) -> None:
    """Rounded keys and values move probabilities, whatever the company. A scale has 4 bytes."""
    sizes = {"max_seqs": 8, "block_size": 8, "num_blocks": 32, "max_len": 128, "prefix_cache": False}
    made = []
    for kv_dtype in (None, kept):
        config = EngineConfig(kv_dtype=kv_dtype, **sizes)
        engine = Engine.open(
            find_model("tiny"), backend="torch", device=cpu(), dtype=torch.bfloat16, config=config
        )
        made.append((engine.memory()["kv_pool_bytes"], engine.decoder.kv_dtype))
    assert made[1] == (share * made[0][0], dtype)
    config = EngineConfig(kv_dtype=kept, **sizes)
    engine = Engine.open(find_model("tiny"), backend="torch", device=cpu(), config=config)
    together = tokens(engine)
    assert [tokens(engine, [prompt])[0] for prompt in PROMPTS] == together
    asked = replace(PARAMS, logprobs=True)
    seen = [[done.logprobs for done in each.generate(PROMPTS, asked)] for each in (engine, opened("none"))]
    assert seen[0] != seen[1]


KEPT = (
    {"quantize": "int8"},
    {"quantize": "int4-g128"},
    {"quantize": "none", "kv_dtype": "fp8"},
    {"quantize": "none", "kv_dtype": "int8"},
)
by_what = pytest.mark.parametrize(
    "kept", KEPT, ids=lambda kept: f"KV {kept['kv_dtype']}" if "kv_dtype" in kept else kept["quantize"]
)


def kept_so(kept: dict[str, str], **settings) -> Engine:
    """An engine whose weights or cache are quantized."""
    return opened(kept["quantize"], quantize_head=kept["quantize"] != "none", **kept, **settings)


@by_what
@pytest.mark.parametrize("num_blocks", [32, 8])
def test_forks(kept: dict[str, str], num_blocks: int) -> None:
    """Sequences of one prompt are requests with the seeds that follow, also where they are preempted and a
    block of the prompt's is copied when one of them writes into it."""
    prompt, params = PROMPTS[2], replace(PARAMS, temperature=1.0, seed=11)
    forked = kept_so(kept, num_blocks=num_blocks, prefix_cache=False)
    lone = kept_so(kept, prefix_cache=False)
    done = forked.generate([prompt], replace(params, n=3))
    expected = [lone.generate([prompt], replace(params, seed=11 + index))[0] for index in range(3)]
    assert [each.token_ids for each in done] == [each.token_ids for each in expected]
    assert (forked.scheduler.preemptions > 0) == (num_blocks == 8)
    assert forked.pool.num_used == 0


@by_what
def test_stop_strings_and_aborts(kept: dict[str, str]) -> None:
    """One sequence ends at a string, another is dropped, and the third is as it is alone."""
    engine = kept_so(kept, prefix_cache=False, tokenizer=WordTokenizer())
    full = tokens(engine)
    stop = f"{full[0][6]} {full[0][7]}"
    engine.add_request("stopped", PROMPTS[0], replace(PARAMS, stop=(stop,)))
    engine.add_request("dropped", PROMPTS[1], PARAMS)
    engine.add_request("whole", PROMPTS[2], PARAMS)
    got: dict[str, list[int]] = {}
    while engine.has_work:
        for token in engine.step():
            got.setdefault(token.request_id, []).append(token.token_id)
        if len(got.get("dropped", [])) == 3:
            engine.abort("dropped")
    first = next(end for end in range(1, 17) if stop in " ".join(map(str, full[0][:end])))
    assert got == {"stopped": full[0][:first], "dropped": full[1][:3], "whole": full[2]}
    assert engine.pool.num_used == 0


def test_scales_stay_with_blocks_of_the_prefix_cache() -> None:
    """Hits, chunks, preemption and company change no token."""
    kept = {"quantize": "none", "kv_dtype": "int8"}
    lone = kept_so(kept, prefix_cache=False)
    expected = [tokens(lone, [prompt])[0] for prompt in PROMPTS]
    caching = kept_so(kept)
    assert tokens(caching) == tokens(caching) == expected
    assert sum(step.prefix_hit_tokens for step in caching.take_step_stats()) > 0
    tight = kept_so(kept, num_blocks=15, prefix_cache=False, max_step_tokens=24, prefill_chunk=11)
    assert tokens(tight) == expected
    assert tight.scheduler.preemptions > 0


def test_triton_gives_torchs_tokens_over_an_int8_cache() -> None:
    """Prompts, decodes, and forks that copy a block with its scales; the kernels run in the interpreter."""
    found = []
    for backend, device in (("torch", cpu()), ("triton", cpu(interpret=True))):
        config = EngineConfig(block_size=16, max_seqs=4, max_step_tokens=64, num_blocks=16, kv_dtype="int8")
        engine = Engine.open(SmallSource(), backend=backend, device=device, config=config)
        greedy = engine.generate([[5, 6, 7] * 7, [9, 1]], SamplingParams(max_tokens=5, ignore_eos=True))
        sampling = SamplingParams(max_tokens=4, ignore_eos=True, temperature=1.0, seed=3, n=2)
        forked = engine.generate([[11, 12, 13] * 6], sampling)
        found.append([each.token_ids for each in (*greedy, *forked)])
    assert found[0] == found[1]
    assert found[0][2] != found[0][3]
