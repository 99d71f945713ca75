"""Models, sources and calls for teams of processes: importable by name, as their other members need them."""

from __future__ import annotations

import contextlib
import random
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
from backbench.engine.models.layers import ALL_LAYERS, WHOLE, Shard, Stage
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

    def load_weights(
        self, device: torch.device, dtype: torch.dtype, shard: Shard = WHOLE, stage: Stage = ALL_LAYERS
    ) -> Weights:
        weights = random_weights(self.config, device, dtype, shard, stage)
        for tensor in weights.tensors():
            if tensor.dim() == 2 and tensor.dtype == torch.float32:
                tensor.mul_(8.0)
        return weights


@dataclass
class WrongStageSource(LoudSource):
    """The second stage has its layers in another order."""

    def load_weights(
        self, device: torch.device, dtype: torch.dtype, shard: Shard = WHOLE, stage: Stage = ALL_LAYERS
    ) -> Weights:
        weights = super().load_weights(device, dtype, shard, stage)
        if stage.number == 1:
            weights.layers.reverse()
        return weights


@dataclass
class WrongShardSource(LoudSource):
    """The last device has the columns of one product in another order: a shard cut at a wrong place."""

    def load_weights(
        self, device: torch.device, dtype: torch.dtype, shard: Shard = WHOLE, stage: Stage = ALL_LAYERS
    ) -> Weights:
        weights = super().load_weights(device, dtype, shard, stage)
        if shard.world > 1 and shard.rank == shard.world - 1:
            held = weights.layers[0].attention_output
            assert isinstance(held, Weight)
            codes = held.q.view(torch.uint8) if held.q.itemsize == 1 else held.q
            codes.copy_(codes.roll(1, dims=1))
        return weights


def in_stages(source: Any, count: int, team: Team | None = None, **settings: Any) -> Engine:
    """`open_on` over `count` processes that divide the layers among them."""
    return open_on(source, 1, team, pp=count, **settings)


def open_on(
    source: Any,
    world: int,
    team: Team | None = None,
    overrides: Mapping[str, str] | None = None,
    **settings: Any,
) -> Engine:
    """An engine of the torch backend over `world` processes of this CPU, block size 4."""
    usual = {"block_size": 4, "max_seqs": 8, "max_step_tokens": 96, "tp": world}
    config = EngineConfig(**(usual | settings))
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


def answers(engine: Engine) -> list[tuple[list[int], list[float]]]:
    done = []
    for params in KINDS:
        done += engine.generate(prompts(engine.model_config.vocab_size), params)
    return [(each.token_ids, each.logprobs) for each in done]


def traffic(engine: Engine, seed: int, num_requests: int = 24) -> dict[tuple[str, int], list[int]]:
    rng = random.Random(seed)
    shared = [rng.randrange(97) for _ in range(30)]
    tokens: dict[tuple[str, int], list[int]] = {}
    for number in range(num_requests):
        prompt = shared[: rng.choice((0, 12, 30))] + [rng.randrange(97) for _ in range(rng.randrange(1, 40))]
        params = SamplingParams(
            max_tokens=rng.randrange(1, 24),
            temperature=rng.choice((0.0, 1.0)),
            seed=number,
            n=rng.choice((1, 1, 2)),
        )
        engine.add_request(str(number), prompt, params)
        for _ in range(rng.randrange(6)):
            for token in engine.step():
                tokens.setdefault((token.request_id, token.sequence), []).append(token.token_id)
        if number % 7 == 6:
            engine.abort(str(number))
    while engine.has_work:
        for token in engine.step():
            tokens.setdefault((token.request_id, token.sequence), []).append(token.token_id)
    return tokens
