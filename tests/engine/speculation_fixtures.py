"""Engines on the small model that speculate, with every kind of proposer."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from eagle3_fixtures import head_folder
from engine_fixtures import VOCAB, loud_weights, open_small, small_config

from backbench.engine.engine import Engine
from backbench.engine.models.decoder import Decoder
from backbench.engine.models.weights import Weights
from backbench.engine.scheduling.blocks import BlockPool
from backbench.engine.scheduling.scheduler import StepPlan
from backbench.engine.scheduling.sequence import Sequence
from backbench.engine.speculation.draft import DraftProposer
from backbench.engine.speculation.proposer import Proposer

TOKENS = 3
PROPOSERS = ("ngram", "draft of one layer", "draft that is the target", "one that knows", "eagle3 head")

Knows = Callable[[Sequence], list[int]]
"""A sequence's output as it will be."""


class OneThatKnows(Proposer):
    """Drafts the true output, with a wrong token at a random place, and now and then nothing: every length of
    acceptance comes up."""

    def __init__(self, knows: Knows, seed: int = 0) -> None:
        self.knows = knows
        self.random = random.Random(seed)

    def propose(self, plan: StepPlan, rooms: list[int], pool: BlockPool) -> list[list[int]]:
        found = []
        for part, room in zip(plan.slices, rooms, strict=False):
            sequence = part.sequence
            done = len(sequence.token_ids) - sequence.prompt_len
            drafted = self.knows(sequence)[done : done + room]
            wrong = self.random.randrange(-2, TOKENS + 2)
            if 0 <= wrong < len(drafted):
                drafted[wrong] = (drafted[wrong] + 1) % VOCAB
            found.append([] if wrong == -2 else drafted)
        return found


def first_layers(weights: Weights, count: int) -> Weights:
    return Weights(weights.embedding, weights.layers[:count], weights.final_norm, weights.lm_head)


def draft_decoder(engine: Engine, layers: int) -> Decoder:
    """The small model's first layers: with both of them, the model itself."""
    config = replace(small_config(), num_layers=layers, windows=small_config().windows[:layers])
    limits = replace(engine.limits, draft_tokens=0)
    return Decoder(
        config, first_layers(loud_weights(), layers), engine.selection, dtype=torch.float32, limits=limits
    )


def open_speculating(proposer: str, *, knows: Knows | None = None, **settings: Any) -> Engine:
    """`open_small` with one of PROPOSERS, drafting at any price unless `adaptive_drafts` is set."""
    asked = f"eagle3:{head_folder(small_config())}" if proposer == "eagle3 head" else "ngram"
    engine = open_small(**({"speculate": f"{asked}:{TOKENS}", "adaptive_drafts": False} | settings))
    assert engine.speculator is not None
    if proposer.startswith("draft"):
        decoder = draft_decoder(engine, 1 if "one layer" in proposer else 2)
        rejection = engine.config.speculation_sampling == "rejection"
        engine.speculator.proposer = DraftProposer(
            decoder, engine.selection.operations, engine.limits, graphs=False, keep_probabilities=rejection
        )
    elif proposer == "one that knows":
        assert knows is not None
        engine.speculator.proposer = OneThatKnows(knows)
    return engine


def check_books(engine: Engine) -> None:
    """What holds between steps, whatever was drafted: nothing tentative is left anywhere."""
    engine.pool.check()
    size = engine.pool.block_size
    for sequence in engine.scheduler.running:
        assert sequence.num_landed == sequence.num_computed <= len(sequence.token_ids) == sequence.num_tokens
        assert -(-sequence.num_computed // size) <= len(sequence.blocks) <= sequence.num_computed // size + 1
        assert sequence.num_published * size <= sequence.num_computed
        digests: list[bytes] = []
        for i, block in enumerate(sequence.blocks):
            if engine.pool.is_published(block) and not sequence.forked:
                assert (i + 1) * size <= len(sequence.token_ids)
                assert engine.pool._digests[block] == engine.pool.digest(sequence.token_ids, digests, i)


def acceptance(engine: Engine) -> tuple[int, int]:
    """(tokens drafted, accepted) in the steps since the last call."""
    steps = engine.take_step_stats()
    drafted = sum(sum(step.draft_lengths) for step in steps)
    return drafted, sum(sum(step.accepted_lengths) for step in steps)
