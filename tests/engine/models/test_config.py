"""Configs are read as transformers means them, and what cannot be computed is refused by name."""

from __future__ import annotations

import pytest
import torch

from backbench.engine.models.checkpoint import find_model
from backbench.engine.models.config import ModelConfig, from_hf
from backbench.engine.models.presets import SHAPES
from backbench.errors import EngineError

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
}


def read(**changes) -> ModelConfig:
    return from_hf({**BASE, **changes})


def test_new_and_old_rope_layouts_agree():
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 128
    new = read(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **scaling})
    old = read(rope_theta=5e5, rope_scaling={"type": "llama3", **scaling})
    assert new == old
    assert (new.rope.kind, new.rope.theta, new.rope.original_max_len) == ("llama3", 5e5, 128)


def test_defaults():
    config = read()
    assert (config.head_dim, config.tied_embeddings, config.dtype) == (16, False, torch.float32)
    assert config.windows == (None, None, None) and config.eos_token_ids == ()
    assert read(num_key_value_heads=None).kv_heads == 4


def test_declared_differences():
    assert read(architectures=["Qwen2ForCausalLM"]).qkv_bias
    assert read(architectures=["Qwen3ForCausalLM"]).qk_norm
    assert not read().qkv_bias and not read().qk_norm
    assert read(eos_token_id=[3, 4]).eos_token_ids == (3, 4)
    assert read(dtype="bfloat16").dtype == read(torch_dtype="torch.bfloat16").dtype == torch.bfloat16


def test_windows():
    assert read(sliding_window=9).windows == (None,) * 3  # llama ignores it
    assert read(architectures=["MistralForCausalLM"], sliding_window=9).windows == (9,) * 3
    qwen = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 9}
    assert read(**qwen).windows == (None,) * 3
    assert read(**qwen, use_sliding_window=True, max_window_layers=1).windows == (None, 9, 9)
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    assert read(**qwen, use_sliding_window=True, layer_types=kinds).windows == (9, None, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "Unknown architecture GPT2LMHeadModel; known are LlamaForCausalLM, MistralForCausalLM, "
            "Qwen2ForCausalLM, Qwen3ForCausalLM.",
        ),
        ({"architectures": None}, "Unknown architecture none given"),
        ({"hidden_size": None}, "needs a positive integer 'hidden_size'; it has None"),
        ({"num_key_value_heads": 3}, "4 attention heads do not divide among 3"),
        ({"hidden_act": "gelu"}, "Activation 'gelu' is not served"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantized \(gptq\)"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "Unknown rope type 'longrope'; known are default"),
        ({"rope_parameters": {"rope_type": "linear"}}, "'linear' needs a 'factor'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ by layer type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor of 0.5"),
        ({"dtype": "float8_e4m3fn"}, "checkpoint in float8_e4m3fn"),
    ],
)
def test_what_cannot_be_computed_is_refused(changes, message):
    with pytest.raises(EngineError, match=message) as caught:
        read(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "billions"),
    [
        # Published parameter counts (model cards), to 0.1 % where the card gives that many digits.
        ("qwen3-0.6b", 0.596),
        ("qwen3-8b", 8.19),
        ("qwen3-32b", 32.76),
        ("llama-2-7b", 6.738),
        ("llama-3.1-8b", 8.030),
        ("llama-3.1-70b", 70.554),
        ("mistral-7b", 7.242),
        ("qwen2.5-7b", 7.616),
    ],
)
def test_shapes_have_their_published_size(shape, billions):
    assert find_model(f"shape:{shape}").config.num_parameters == pytest.approx(billions * 1e9, rel=1e-3)


def test_every_shape_is_readable():
    assert all(from_hf(config).dtype == torch.bfloat16 for config in SHAPES.values())


def test_facts_by_hand():
    config = read(tie_word_embeddings=True)
    layer = (8 * 16 + 4 * 16) * 64 + 3 * 64 * 96
    assert config.linear_parameters == 3 * layer + 100 * 64
    assert config.num_parameters == 3 * (layer + 128) + 100 * 64 + 64
    assert config.weight_bytes(torch.bfloat16) == 2 * config.num_parameters
    assert config.kv_bytes_per_token(torch.bfloat16) == 2 * 3 * 2 * 16 * 2
    assert config.flops_per_token(10) == 2 * config.linear_parameters + 3 * 4 * 4 * 16 * 10
    windowed = read(architectures=["MistralForCausalLM"], sliding_window=4)
    assert windowed.flops_per_token(10) == windowed.flops_per_token(4)
    assert windowed.streamed_weight_bytes(torch.float32) == 4 * (windowed.num_parameters - 6400)
