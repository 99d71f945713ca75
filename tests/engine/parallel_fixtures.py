"""Models, sources and calls for teams of processes: importable by name, as their other members need them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from engine_fixtures import small_config

from backbench.backends.interface import Device, Scheme, Weight
from backbench.backends.interface.device import cpu
from backbench.engine.config import EngineConfig
from backbench.engine.engine import Engine
from backbench.engine.models.config import ModelConfig
from backbench.engine.models.layers import WHOLE, Shard
from backbench.engine.models.on_the_fly import OnTheFly
from backbench.engine.models.weights import Weights, random_weights
from backbench.engine.parallel.team import Member, Team
from backbench.engine.request import SamplingParams

DRAFTING: dict[str, Any] = {
    "speculate": "draft:tiny-draft:2",
    "adaptive_drafts": False,
    "overlap": False,
}
"""Settings of `tiny` with a model that drafts for it at any price."""
BASE = replace(small_config(), hidden_size=64, q_heads=8, ffn_size=128)
WIDE = replace(BASE, hidden_size=128, q_heads=4, head_dim=128, ffn_size=512)
MODELS: dict[str, ModelConfig] = {
    "GQA 4, window, odd vocabulary": BASE,
    "GQA 1, tied": replace(BASE, q_heads=4, kv_heads=4, tied_embeddings=True),
    "GQA 7, biases": replace(BASE, q_heads=28, kv_heads=4, qkv_bias=True, qk_norm=False),
    "one KV head, even vocabulary": replace(BASE, kv_heads=1, vocab_size=256),
    "int4": replace(BASE, on_the_fly=OnTheFly(Scheme("int4", group=32), head=True)),
    "int4, tied, head too": replace(
        BASE, tied_embeddings=True, on_the_fly=OnTheFly(Scheme("int4", group=32), head=True)
    ),
    "fp8 weights": replace(BASE, on_the_fly=OnTheFly(Scheme("fp8"))),
    "fp8 blocks, rows too": replace(
        WIDE,
        on_the_fly=OnTheFly(Scheme("fp8", group=128, group_n=128, activation="fp8-group128"), head=True),
    ),
}


@dataclass
class LoudSource:
    """Random weights scaled up until greedy choices have clear margins and depend on the whole context."""

    config: ModelConfig

    def load_weights(self, device: torch.device, dtype: torch.dtype, shard: Shard = WHOLE) -> Weights:
        weights = random_weights(self.config, device, dtype, shard)
        for tensor in weights.tensors():
            if tensor.dim() == 2 and tensor.dtype == torch.float32:
                tensor.mul_(8.0)
        return weights


@dataclass
class WrongShardSource(LoudSource):
    """The last device has the columns of one product in another order: a shard cut at a wrong place."""

    def load_weights(self, device: torch.device, dtype: torch.dtype, shard: Shard = WHOLE) -> Weights:
        weights = super().load_weights(device, dtype, shard)
        if shard.world > 1 and shard.rank == shard.world - 1:
            held = weights.layers[0].attention_output
            assert isinstance(held, Weight)
            codes = held.q.view(torch.uint8) if held.q.itemsize == 1 else held.q
            codes.copy_(codes.roll(1, dims=1))
        return weights


def open_on(
    source: Any,
    world: int,
    team: Team | None = None,
    overrides: Mapping[str, str] | None = None,
    **settings: Any,
) -> Engine:
    """An engine of the torch backend over `world` processes of this CPU, block size 4."""
    config = EngineConfig(**({"block_size": 4, "max_seqs": 8, "max_step_tokens": 96} | settings), tp=world)
    return Engine.open(source, backend="torch", device=cpu(), config=config, overrides=overrides, team=team)


def prompts(vocab_size: int) -> list[list[int]]:
    """Of one token, of several blocks, and longer than the window."""
    return [
        [(7 * i + 13 * salt) % vocab_size for i in range(length)] for salt, length in enumerate((1, 9, 60))
    ]


KINDS = (
    SamplingParams(max_tokens=10, logprobs=True),
    SamplingParams(max_tokens=10, temperature=0.9, top_p=0.9, seed=5, logprobs=True),
)


def interpreted() -> Device:
    """The CPU, with Triton's interpreter."""
    return cpu(interpret=True)


def add(member: Member, one: int, other: int) -> tuple[int, int]:
    """(rank, sum)."""
    return member.peers.rank, one + other


def fail_on(member: Member, rank: int) -> None:
    """Raises on one member, while the others wait for it."""
    if member.peers.rank == rank:
        raise ValueError("the dog ate it")
    if member.connection is not None:
        member.connection.recv_bytes()


def gone(pids: list[int]) -> bool:
    """Ended; whether their new parent has asked how is not theirs."""
    running = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            running.append(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return not any(running)
