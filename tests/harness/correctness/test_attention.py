"""Attention head by head: wrong kernels planted around a right one are caught, right ones pass."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from backbench.backends.interface import AttentionSpec
from backbench.backends.interface.device import cpu
from backbench.engine.config import EngineConfig
from backbench.engine.engine import Engine
from backbench.engine.models.checkpoint import find_model
from backbench.engine.models.config import ModelConfig, RopeConfig
from backbench.engine.models.weights import Weights, random_weights
from backbench.harness import correctness
from backbench.harness.correctness import attention

ROOT = Path(__file__).parents[3]


def load_planted() -> Any:
    spec = importlib.util.spec_from_file_location("planted_kernels", ROOT / "benchmarks/planted_kernels.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["planted_kernels"] = module
    spec.loader.exec_module(module)
    module.CUT = 100
    return module


planted = load_planted()
LONGEST = 280


class RandomSource:
    """Four layers with random weights, as `shape:` models have them."""

    def __init__(self, **changes: Any) -> None:
        values: dict[str, Any] = {
            "architecture": "qwen3",
            "vocab_size": 300,
            "hidden_size": 128,
            "num_layers": 4,
            "q_heads": 8,
            "kv_heads": 2,
            "head_dim": 32,
            "ffn_size": 256,
            "rms_norm_eps": 1e-6,
            "rope": RopeConfig(),
            "tied_embeddings": True,
            "qkv_bias": False,
            "qk_norm": True,
            "windows": (None,) * 4,
            "max_len": 512,
            "eos_token_ids": (),
            "dtype": torch.bfloat16,
        }
        self.config = ModelConfig(**values | changes)

    def load_weights(self, device: torch.device, dtype: torch.dtype) -> Weights:
        return random_weights(self.config, device, dtype)


def models() -> dict[str, Any]:
    windowed = {"architecture": "mistral", "qk_norm": False, "windows": (48,) * 4, "head_dim": 64}
    return {
        "tiny": find_model("tiny"),
        "like qwen3": RandomSource(),
        "like mistral": RandomSource(**windowed, kv_heads=4, tied_embeddings=False),
    }


MODELS = models()
ENGINES: dict[tuple[str, str], Engine] = {}


def engine_of(model: str, backend: str, dtype: torch.dtype) -> Engine:
    key = (model, f"{backend} {dtype}")
    if key not in ENGINES:
        ENGINES[key] = planted.open_engine(MODELS[model], backend, cpu(), dtype, LONGEST)
    return ENGINES[key]


@pytest.mark.parametrize("model", list(MODELS))
@pytest.mark.parametrize("fault", planted.FAULTS[1:], ids=lambda fault: fault.name)
def test_a_planted_fault_is_caught_in_bf16(model: str, fault: Any) -> None:
    engine = engine_of(model, "torch", torch.bfloat16)
    if not replace(fault, needs_context=0).applies(engine, LONGEST):
        pytest.skip("changes nothing in this model")
    with planted.planted(engine, fault):
        found = correctness.check(engine, MODELS[model], LONGEST)
    assert found["passed"] is False, found
    assert found["attention"]["passed"] is False
    assert (
        found["attention"]["worst_share_of_limit"] is None or found["attention"]["worst_share_of_limit"] > 2
    )
    assert (
        found["reason"].startswith("attention differs from torch's in layer ") and len(found["reason"]) < 200
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["torch", "sdpa"])
@pytest.mark.parametrize("model", list(MODELS))
def test_right_kernels_pass_with_room(model: str, backend: str, dtype: torch.dtype) -> None:
    found = correctness.check(engine_of(model, backend, dtype), MODELS[model], LONGEST)
    assert found["passed"] is True, found
    assert found["attention"]["worst_share_of_limit"] < 0.6
    assert found["attention"]["longest_context"] == LONGEST
    assert found["mean_abs_logprob_diff"] < 0.75 * found["tolerance_mean"]


def test_a_right_kernel_in_a_wrapper_passes() -> None:
    engine = engine_of("like qwen3", "torch", torch.bfloat16)
    with planted.planted(engine, planted.RIGHT):
        assert correctness.check(engine, MODELS["like qwen3"], LONGEST)["passed"] is True


def spec(**changes: Any) -> AttentionSpec:
    plain = AttentionSpec(4, 2, 32, torch.float32, torch.float32, 16, 1.0, max_seqs=64, max_len=4096)
    return replace(plain, **changes)


def test_rows_reach_the_longest_context_by_a_decode_and_by_a_prompt() -> None:
    decodes, mixed = attention.rows_of(spec(), 3000)
    assert decodes[-1] == attention.Row(1, 3000)
    assert mixed[-1].length == 3000 and mixed[-1].query > 1
    assert max(row.length for row in attention.rows_of(spec(max_len=100), 3000)[0]) == 100


def test_rows_stand_at_the_edges_of_a_window() -> None:
    decodes, mixed = attention.rows_of(spec(window=200), 3000)
    assert {199, 200, 201, 400} <= {row.length for row in decodes}
    assert attention.Row(20, 207) in mixed


def test_steps_stay_under_the_limits_of_the_engine() -> None:
    small = spec(max_seqs=2, max_tokens=50)
    steps = attention.stages(small, 300, 77, torch.device("cpu"))
    assert {row.length for step in steps for row in step.rows} >= {1, 17, 257, 300}
    for step in steps:
        assert len(step.rows) <= 2
        for piece in (*step.contexts, step.step):
            assert piece.batch.num_tokens == len(piece.tokens) <= 50
    contexts = sum(piece.batch.num_tokens for step in steps for piece in step.contexts)
    assert contexts == sum(row.context for step in steps for row in step.rows)


def test_limits_of_the_engine_are_kept_in_a_check() -> None:
    source: Any = MODELS["like qwen3"]
    config = EngineConfig(max_seqs=2, max_step_tokens=40, num_blocks=40, max_len=LONGEST)
    engine = Engine.open(source, backend="torch", device=cpu(), config=config)
    assert correctness.check(engine, source, LONGEST)["passed"] is True


def test_the_reference_takes_no_second_copy_of_the_weights() -> None:
    from backbench.harness.correctness import reference

    weights = MODELS["like qwen3"].load_weights(torch.device("cpu"), torch.bfloat16)
    decoder = reference.wide_decoder(MODELS["like qwen3"].config, weights, cpu(), torch.float32, 512)
    held = {layer.qkv.data_ptr() for layer in decoder.layers} | {decoder.lm_head.data_ptr()}
    assert held <= {tensor.data_ptr() for tensor in weights.tensors()}


def test_long_contexts_are_compared_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same verdict at the same places, and a fault in the last chunk is found."""
    engine, source = engine_of("like qwen3", "torch", torch.bfloat16), MODELS["like qwen3"]
    whole = correctness.check(engine, source, LONGEST)["attention"]
    monkeypatch.setattr(attention, "CHUNK_TOKENS", 50)
    found = correctness.check(engine, source, LONGEST)["attention"]
    assert found["passed"] is True
    assert abs(found["worst_share_of_limit"] - whole["worst_share_of_limit"]) < 0.1
    wrong = next(fault for fault in planted.FAULTS if "wrong slot" in fault.name)
    with planted.planted(engine, wrong):
        assert correctness.check(engine, source, LONGEST)["attention"]["passed"] is False
