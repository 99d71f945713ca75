"""Rotary tables against transformers' own frequencies, at shapes the published models use."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from backbench.engine.models.hf_config import from_hf
from backbench.engine.models.presets import LLAMA3_ROPE
from backbench.engine.models.rope import rotary_table

YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768}
ROPES = [
    {"rope_type": "default", "rope_theta": 1e6},
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5},
    LLAMA3_ROPE,
    YARN,
    {**YARN, "attention_factor": 1.25, "beta_fast": 16.0, "beta_slow": 2.0},
    {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7, "truncate": False},
    # The ramp would end beyond the last dimension (39 to 137 of 128), and begin before the first.
    {**YARN, "rope_theta": 10.0, "original_max_position_embeddings": 847},
    {**YARN, "original_max_position_embeddings": 64},
]


@pytest.mark.parametrize("rope", ROPES)
def test_table_equals_transformers(rope):
    hf = LlamaConfig(
        hidden_size=512,
        num_attention_heads=4,
        head_dim=128,
        max_position_embeddings=131_072,
        rope_parameters=dict(rope),
    )
    config = from_hf({**hf.to_dict(), "architectures": ["LlamaForCausalLM"]})
    positions = torch.tensor([0, 1, 17, 4095, 40_000])
    cos, sin = LlamaRotaryEmbedding(hf)(torch.zeros(1), positions[None])
    rotary = rotary_table(config.rope, config.head_dim, torch.device("cpu"), 40_001)
    expected = torch.cat([cos[0, :, :64], sin[0, :, :64]], dim=-1)
    assert rotary.rotary_dim == 128 and rotary.cos_sin.shape == (40_001, 128)
    # An fp32 frequency may differ in its last bit (2^-24), times up to 40,000 radians.
    torch.testing.assert_close(rotary.cos_sin[positions], expected, atol=40_000 * 2**-23, rtol=0)
    torch.testing.assert_close(rotary.cos_sin[positions[:3]], expected[:3], atol=1e-5, rtol=0)
