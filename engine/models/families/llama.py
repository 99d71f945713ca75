"""Llama and what follows it exactly: no biases, no windows."""

from __future__ import annotations

from backbench.engine.models.families import Family, one_window
from backbench.engine.models.fields import Honoured

FAMILY = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    windows=one_window,
    own_fields={"eos_token_id": Honoured(2)},
)
