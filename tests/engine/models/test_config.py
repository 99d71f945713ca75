"""The sizes that follow from a config, and the published shapes."""

from __future__ import annotations

import pytest
import torch

from backbench.engine.models.checkpoint import find_model
from backbench.engine.models.config import ModelConfig
from backbench.engine.models.hf_config import from_hf
from backbench.engine.models.presets import SHAPES

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
    assert config.kv_bytes_per_token(torch.int8) == 2 * 3 * 2 * (16 + 4)
    assert config.flops_per_token(10) == 2 * config.linear_parameters + 3 * 4 * 4 * 16 * 10
    windowed = read(architectures=["MistralForCausalLM"], sliding_window=4)
    assert windowed.flops_per_token(10) == windowed.flops_per_token(4)
    assert windowed.streamed_weight_bytes(torch.float32) == 4 * (windowed.num_parameters - 6400)
