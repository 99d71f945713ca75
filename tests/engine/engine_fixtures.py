"""A small random model behind the engine, for tests: two layers, grouped queries, a 97-token vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from backbench.backends.interface.device import detect
from backbench.engine.config import EngineConfig
from backbench.engine.engine import Engine
from backbench.engine.limits import EngineLimits
from backbench.engine.models.config import ModelConfig, RopeConfig
from backbench.engine.models.weights import Weights, random_weights

VOCAB = 97
CONTEXT = 128


def small_config(eos: tuple[int, ...] = ()) -> ModelConfig:
    return ModelConfig(
        architecture="qwen3",
        vocab_size=VOCAB,
        hidden_size=48,
        num_layers=2,
        q_heads=6,
        kv_heads=2,
        head_dim=16,
        ffn_size=64,
        rms_norm_eps=1e-6,
        rope=RopeConfig(),
        tied_embeddings=False,
        qkv_bias=False,
        qk_norm=True,
        windows=(None, 40),
        max_len=CONTEXT,
        eos_token_ids=eos,
        dtype=torch.float32,
    )


def make_limits(**changed: int) -> EngineLimits:
    """Limits of a tiny engine: blocks of 4 tokens, 4 sequences, 16 prompt tokens a step."""
    sizes = {"block_size": 4, "max_len": 32, "max_seqs": 4, "max_step_tokens": 16, "num_blocks": 32} | changed
    return EngineLimits(**({"prefill_chunk": sizes["max_step_tokens"]} | sizes))


class SmallSource:
    """A model source whose weights are random: what `Engine.open` needs of one, without files."""

    def __init__(self, eos: tuple[int, ...] = ()) -> None:
        self.config = small_config(eos)

    def load_weights(self, device: torch.device, dtype: torch.dtype) -> Weights:
        return loud_weights()


@cache
def loud_weights() -> Weights:
    """Random weights scaled up until greedy choices have clear margins and depend on the whole context."""
    weights = random_weights(small_config(), torch.device("cpu"), torch.float32)
    for tensor in weights.tensors():
        if tensor.dim() == 2:
            tensor.mul_(8.0)
    return weights


class WordTokenizer:
    """Decodes each token id to its digits, separated by spaces."""

    def decode(self, token_ids: Sequence[int]) -> str:
        return " ".join(map(str, token_ids))


def open_small(*, eos: tuple[int, ...] = (), tokenizer: Any = None, **settings: Any) -> Engine:
    """An engine on the small model with the torch backend on the CPU, block size 4."""
    config = EngineConfig(**({"block_size": 4, "max_seqs": 8, "max_step_tokens": 96} | settings))
    source: Any = SmallSource(eos)
    return Engine.open(source, backend="torch", device=detect(), config=config, tokenizer=tokenizer)


def nothing_is_kept(engine: Engine) -> bool:
    """Whether no request has left anything behind."""
    requests = engine.requests
    return not (requests._sequences or requests._unforked or requests._beams or requests._watchers)
