"""A model's layers divided into stages: each has its own, and nothing else is loaded for it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from engine_fixtures import small_config
from hypothesis import given
from hypothesis import strategies as st

from backbench.backends.interface import PackedWeight, Scheme, Weight
from backbench.engine.models.checkpoint import find_model
from backbench.engine.models.config import ModelConfig
from backbench.engine.models.formats.dense import SafetensorsFiles
from backbench.engine.models.layers import Stage
from backbench.engine.models.on_the_fly import OnTheFly
from backbench.engine.models.weights import Weights, random_weights
from backbench.errors import BackendError

CPU = torch.device("cpu")


def deep(num_layers: int = 6, **changes: Any) -> ModelConfig:
    return replace(small_config(), num_layers=num_layers, windows=(None,) * num_layers, **changes)


@given(layers=st.integers(1, 40), count=st.integers(1, 8), vocab=st.integers(1, 20_000))
def test_stages_are_contiguous_and_even(layers: int, count: int, vocab: int) -> None:
    spec = deep(layers, vocab_size=vocab).spec
    if count > layers:
        with pytest.raises(BackendError, match=f"{layers} layers cannot be divided among {count} stages"):
            spec.stage_layers(count)
        return
    stages = spec.stage_layers(count)
    assert [index for stage in stages for index in stage] == list(range(layers))
    assert len(stages) == count and all(stages)
    each = sum(product.parameters for product in spec.layers[0].products)
    share = (layers * each + spec.head.parameters) / count
    # Each boundary is as near as a whole layer allows, unless a stage would be left with none.
    for number, stage in enumerate(stages[:-1], start=1):
        forced = len(stage) == 1 or layers - stage.stop == count - number
        assert forced or abs(stage.stop * each - number * share) <= each / 2 + 1


def test_the_head_counts_as_the_layers_it_is_as_large_as() -> None:
    """36 layers of 192.9 million, and a head of 622.3 million: 3.2 layers."""
    spec = find_model("shape:qwen3-8b").config.spec
    assert [len(stage) for stage in spec.stage_layers(2)] == [20, 16]
    assert [len(stage) for stage in spec.stage_layers(4)] == [10, 10, 9, 7]


def tensors_of(held: Any) -> list[torch.Tensor]:
    if isinstance(held, Weight | PackedWeight):
        return list(held.tensors())
    return [] if held is None else [held]


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors_of(one), tensors_of(other), strict=True))


def require_parts(whole: Weights, stages: list[Weights]) -> None:
    layers = [layer for stage in stages for layer in stage.layers]
    for layer, own in zip(whole.layers, layers, strict=True):
        assert all(same(held, vars(own)[role]) for role, held in vars(layer).items())
    assert same(whole.embedding, stages[0].embedding)
    assert same(whole.final_norm, stages[-1].final_norm) and same(whole.lm_head, stages[-1].lm_head)
    for before, after in pairwise(stages):
        assert before.final_norm is before.lm_head is after.embedding is None


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("quantized", [None, "layers", "head too"])
def test_random_stages_are_parts_of_the_whole(tied: bool, quantized: str | None) -> None:
    scheme = OnTheFly(Scheme("int4", group=16), head=quantized == "head too")
    model = deep(tied_embeddings=tied, qkv_bias=True, on_the_fly=None if quantized is None else scheme)
    whole = random_weights(model, CPU, torch.float32)
    stages = [random_weights(model, CPU, torch.float32, stage=Stage(number, 3)) for number in range(3)]
    require_parts(whole, stages)
    assert sum(stage.streamed_bytes for stage in stages) == whole.streamed_bytes
    once = whole.embedding.nbytes if tied and quantized != "head too" else 0  # at both ends
    assert sum(stage.num_bytes for stage in stages) == whole.num_bytes + once
    for number, stage in enumerate(stages):
        spec = model.spec.stage(Stage(number, 3))
        assert [role for role, _ in stage.products()] == [product.role for product in spec.products]


@pytest.mark.parametrize("quantized", [None, "fp8"])
def test_a_stage_reads_its_own_tensors_alone(quantized: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    source = find_model("tiny").on_the_fly(None if quantized is None else OnTheFly(Scheme(quantized)))
    read: list[str] = []
    original = SafetensorsFiles.read
    monkeypatch.setattr(
        SafetensorsFiles, "read", lambda files, name, *args: read.append(name) or original(files, name, *args)
    )
    whole = source.load_weights(CPU, torch.float32)
    everything, stages = set(read), []
    for number in range(2):
        read.clear()
        stages.append(source.load_weights(CPU, torch.float32, stage=Stage(number, 2)))
        own = source.config.spec.stage_layers(2)[number]
        of_layers = {int(each.split(".")[2]) for each in read if each.startswith("model.layers.")}
        assert of_layers == set(own)
        assert set(read) < everything
    require_parts(whole, stages)
