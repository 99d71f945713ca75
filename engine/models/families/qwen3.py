"""Qwen 3, dense: a norm on each head of queries and keys; windows in some layers, if any."""

from __future__ import annotations

from backbench.engine.models.families import Family, window_by_layer
from backbench.engine.models.fields import Honoured

FAMILY = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    windows=window_by_layer,
    qk_norm=True,
    own_fields={
        "head_dim": Honoured(128),
        "num_key_value_heads": Honoured(32),
        "use_sliding_window": Honoured(False),
        "sliding_window": Honoured(4096),
        "max_window_layers": Honoured(28),
    },
)
