"""Mistral: one sliding window for all layers."""

from __future__ import annotations

from backbench.engine.models.families import Family, one_window
from backbench.engine.models.fields import Honoured

FAMILY = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    windows=one_window,
    own_fields={
        "num_key_value_heads": Honoured(8),
        "sliding_window": Honoured(4096),
        "eos_token_id": Honoured(2),
    },
)
