"""What an EAGLE-3 head computes: whole sequences against plain torch, and the target's states it is given."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from eagle3_fixtures import LAYOUTS, Layout, PlainHead, head_folder, target_states
from engine_fixtures import loud_weights, open_small, small_config
from torch import Tensor

from backbench.backends.interface.device import cpu
from backbench.backends.torch.operations import TorchOperations
from backbench.engine.config import EngineConfig
from backbench.engine.engine import Engine
from backbench.engine.models.checkpoint import find_model
from backbench.engine.models.decoder import Wanted, whole_sequences
from backbench.engine.models.eagle3 import Eagle3Head

TOKENS = [(7 * i * i + 3) % 97 for i in range(30)]
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
"""fp32 sums of up to 144 products in another order, of numbers up to about ten."""


def opened(layout: Layout, **settings: Any) -> tuple[Eagle3Head, PlainHead, Engine]:
    folder = head_folder(small_config(), layout)
    engine = open_small(speculate=f"eagle3:{folder}:3", **settings)
    assert engine.speculator is not None
    head = engine.speculator.proposer.decoder  # type: ignore[attr-defined]
    return head, PlainHead(folder, loud_weights().embedding), engine


def advanced(head: Eagle3Head, fused: Tensor, following: Tensor, wanted: bool = False) -> Tensor:
    """The head's states of a whole sequence at once; of its last token alone where only that is `wanted`."""
    count = len(following)
    batch = whole_sequences([count], head.limits.block_size, torch.device("cpu"))
    asked = Wanted.of(batch, torch.tensor([count - 1]), torch.tensor([0])) if wanted else None
    caches = head.new_caches(batch.block_table.shape[1])
    return head.advance(fused.clone(), following, torch.arange(count), batch, caches, asked)


@pytest.mark.parametrize(
    "layout",
    [
        *(Layout(name) for name in LAYOUTS),
        *(Layout(name, norm_before_residual=True) for name in LAYOUTS),
        Layout(draft_vocab=None),
        Layout(own_embedding=True, hidden_size=32),
        Layout("speculators", qk_norm=True),
    ],
    ids=str,
)
def test_a_whole_sequence_equals_plain_torch(layout: Layout) -> None:
    head, plain, engine = opened(layout)
    states, following = target_states(engine.decoder, TOKENS[:-1]), torch.tensor(TOKENS[1:])
    fused = head.fuse(states.chunk(3, -1))
    torch.testing.assert_close(fused, plain.fuse(states), **CLOSE)
    hidden = advanced(head, fused, following)
    expected = plain.advance(fused, following)
    torch.testing.assert_close(hidden, expected, **CLOSE)
    torch.testing.assert_close(advanced(head, fused, following, wanted=True), expected[-1:], **CLOSE)
    logits = head.logits(hidden)
    torch.testing.assert_close(logits[:, plain.target_ids], plain.logits(hidden), **CLOSE)
    others = torch.ones(97, dtype=torch.bool).index_fill(0, plain.target_ids, False)
    assert (logits[:, others] == -torch.inf).all()


def test_the_tap_is_given_what_transformers_calls_hidden_states() -> None:
    """What enters each layer, the embedding first, of every token, whichever the last layer computes."""
    from transformers import AutoModelForCausalLM

    source = find_model("tiny")
    config = EngineConfig(block_size=16, max_len=64, num_blocks=8, max_seqs=2)
    decoder = Engine.open(source, backend="torch", device=cpu(), config=config).decoder
    path = source.path  # type: ignore[attr-defined]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.inference_mode():
        expected = model(torch.tensor([TOKENS]), output_hidden_states=True).hidden_states
    found = target_states(decoder, TOKENS, (0, 2, 4)).chunk(3, -1)
    for layer, states in zip((0, 2, 4), found, strict=True):
        torch.testing.assert_close(states, expected[layer][0], rtol=1e-4, atol=1e-4)
    # fp32 sums of up to 640 products, in another order


class InPlace(TorchOperations):
    """Overwrites the residual stream, as the interface allows."""

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return self.rms_norm(residual.add_(x), weight, eps), residual


def test_operations_that_overwrite_the_residual_stream_change_nothing() -> None:
    head, _, engine = opened(Layout("speculators", norm_before_residual=True))
    following = torch.tensor(TOKENS[1:])
    states = target_states(engine.decoder, TOKENS[:-1])
    hidden = advanced(head, head.fuse(states.chunk(3, -1)), following)
    engine.decoder.operations = head.operations = InPlace()
    again = target_states(engine.decoder, TOKENS[:-1])
    assert torch.equal(again, states)
    assert torch.equal(advanced(head, head.fuse(again.chunk(3, -1)), following), hidden)


def test_memory_counts_a_shared_embedding_once() -> None:
    shared, _, engine = opened(Layout())
    own, _, other = opened(Layout(own_embedding=True))
    assert own.own_bytes - shared.own_bytes == 97 * 48 * 4
    layer = 2 * 2 * 16 * 4  # keys and values of two heads in fp32
    assert shared.cache_bytes_per_block() == 4 * (layer + 48 * 4)
    assert engine.memory()["weights_bytes"] == engine.weights.num_bytes + shared.own_bytes
    assert other.weights is not None


def test_an_embedding_that_is_the_targets_is_not_held_twice() -> None:
    head, _, _ = opened(Layout(own_embedding=True))
    before = head.own_bytes
    head.share_embedding(head.weights.embedding.clone())
    assert before - head.own_bytes == head.weights.embedding.nbytes


def test_blocks_are_copied_with_their_hidden_states() -> None:
    head, _, _ = opened(Layout())
    caches = head.new_caches(4)
    rows = torch.arange(len(caches[-1]), dtype=torch.float32)
    caches[-1].copy_(rows[:, None].expand_as(caches[-1]))
    # A source that is a later copy's destination is read before it is written.
    head.copy_blocks(caches, torch.tensor([0, 2]), torch.tensor([1, 0]))
    assert caches[-1][:, 0].tolist() == [8, 9, 10, 11, 0, 1, 2, 3, *range(8, 17)]


def test_the_configs_shapes_follow_the_target() -> None:
    head, _, _ = opened(Layout(hidden_size=32, own_embedding=True))
    config = head.config
    assert config.fusion.shape == (32, 3 * 48)
    assert config.spec.layers[0].products[0].shape == ((4 + 2 * 2) * 16, 64)
    assert replace(config, draft_vocab_size=5).spec.head.shape == (5, 32)
