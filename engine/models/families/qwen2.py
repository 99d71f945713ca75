"""Qwen 2 and 2.5: biases on queries, keys and values; windows in some layers, if any."""

from __future__ import annotations

from backbench.engine.models.families import Family, window_by_layer
from backbench.engine.models.fields import Honoured, WithoutEffect

FAMILY = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    windows=window_by_layer,
    qkv_bias=True,
    own_fields={
        "attention_bias": WithoutEffect(),  # the biases are always there
        "num_key_value_heads": Honoured(32),
        "use_sliding_window": Honoured(False),
        "sliding_window": Honoured(4096),
        "max_window_layers": Honoured(28),
    },
)
