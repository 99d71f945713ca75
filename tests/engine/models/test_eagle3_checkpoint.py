"""Which heads are read, and what is said of those that do not fit: one line, naming the field."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from eagle3_fixtures import LAYOUTS, Layout, head_json, head_tensors, write_head
from engine_fixtures import open_small, small_config
from torch import Tensor

from backbench.engine.config import EngineConfig
from backbench.engine.models.checkpoint import find_model
from backbench.engine.models.eagle3_checkpoint import head_config, load_head
from backbench.errors import EngineError

TARGET = small_config()
Change = Callable[[dict[str, Any], dict[str, Tensor]], object]


def written(folder: Path, layout: Layout, change: Change) -> Path:
    config, tensors = head_json(TARGET, layout), head_tensors(TARGET, layout)
    change(config, tensors)
    return write_head(folder, config, tensors)


def layer_of(config: dict[str, Any]) -> dict[str, Any]:
    return config.get("transformer_layer_config", config)


def put(name: str, value: object) -> Change:
    """The field of the head."""
    return lambda config, _: config.update({name: value})


def put_layer(name: str, value: object) -> Change:
    return lambda config, _: layer_of(config).update({name: value})


def drop(name: str) -> Change:
    return lambda _, tensors: tensors.pop(name)


REFUSALS: list[tuple[str, Change]] = [
    ("hidden_size is 32", put_layer("hidden_size", 32)),
    ("target_hidden_size is 64", put("target_hidden_size", 64)),
    ("vocab_size is 98", put_layer("vocab_size", 98)),
    ("draft_vocab_size is 99", put("draft_vocab_size", 99)),
    ("d2t", drop("d2t")),
    ("d2t", lambda _, tensors: tensors["d2t"].fill_(0).add_(97)),
    ("d2t", lambda _, tensors: tensors["d2t"].copy_(-torch.arange(61))),
    ("d2t", lambda _, tensors: tensors.update(d2t=torch.zeros(7, dtype=torch.long))),
    ("fc.weight", drop("fc.weight")),
    ("fc.weight", lambda _, tensors: tensors.update({"fc.weight": torch.ones(48, 96)})),
    ("lm_head.weight", drop("lm_head.weight")),
    ("input_norm.weight", lambda _, tensors: tensors.update({"input_norm.weight": torch.ones(144)})),
    ("norm_before_fc", put("norm_before_fc", True)),
    ("num_hidden_layers is 2", put_layer("num_hidden_layers", 2)),
    ("attention_bias", put_layer("attention_bias", True)),
    ("hidden_act", put_layer("hidden_act", "gelu")),
    ("quantization_config", put_layer("quantization_config", {"quant_method": "fp8"})),
    ("eagle_aux_hidden_state_layer_ids", put("eagle_aux_hidden_state_layer_ids", None)),
    ("eagle_aux_hidden_state_layer_ids", put("eagle_aux_hidden_state_layer_ids", [0, 1, 2])),
    ("eagle_aux_hidden_state_layer_ids", put("eagle_aux_hidden_state_layer_ids", "0, 1")),
    ("fc.weight", put("eagle_aux_hidden_state_layer_ids", [0, 1])),
    ("use_aux_hidden_state", put("eagle_config", {"use_aux_hidden_state": False})),
    ("eagle_config", put("eagle_config", [1])),
    ("spin", put("spin", 1)),
]


def named_alike(value: object) -> str:
    """In every process: a function's own name has its address."""
    return value[:40] if isinstance(value, str) else "change"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("named", "change"), REFUSALS, ids=named_alike)
def test_what_does_not_fit_is_named(layout: str, named: str, change: Change, tmp_path: Path) -> None:
    folder = written(tmp_path / "head", Layout(layout), change)
    with pytest.raises(EngineError) as error:
        config = head_config("head", folder, find_model(str(folder)).hf_config, TARGET)
        load_head(folder, config, torch.device("cpu"), torch.float32)
    assert named in str(error.value)
    assert len(str(error.value)) < 300 + len(str(tmp_path)) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("named", "change"),
    [
        ("speculators_model_type", put("speculators_model_type", "eagle")),
        ("norm_before_residual", lambda config, _: config.pop("norm_before_residual")),
        ("transformer_layer_config", put("transformer_layer_config", 3)),
    ],
)
def test_what_the_second_layout_must_say(named: str, change: Change, tmp_path: Path) -> None:
    folder = written(tmp_path / "head", Layout("speculators"), change)
    with pytest.raises(EngineError, match=named):
        open_small(speculate=f"eagle3:{folder}:3")


def test_a_head_as_wide_as_another_model_needs_its_own_embedding(tmp_path: Path) -> None:
    layout = Layout(hidden_size=32)
    folder = written(tmp_path / "head", layout, lambda *_: None)
    with pytest.raises(EngineError, match="embed_tokens"):
        open_small(speculate=f"eagle3:{folder}:3")


def target_layers(tmp_path: Path, num_layers: int, change: Change) -> tuple[int, ...]:
    folder = written(tmp_path / "head", Layout(), change)
    target = replace(TARGET, num_layers=num_layers, windows=(None,) * num_layers)
    return head_config("head", folder, find_model(str(folder)).hf_config, target).target_layers


def test_which_layers_of_the_target_are_meant(tmp_path: Path) -> None:
    """At the top they are named by what enters them, inside of eagle_config by what leaves them."""
    name = "eagle_aux_hidden_state_layer_ids"
    assert target_layers(tmp_path, 12, put(name, [0, 5, 11])) == (0, 5, 11)
    assert target_layers(tmp_path, 12, lambda config, _: config.pop(name)) == (2, 6, 9)

    def nest(config: dict[str, Any], _: object) -> None:
        config["eagle_config"] = {"use_aux_hidden_state": True, name: config.pop(name)}
        config["eagle_config"][name] = [1, 5, 8]

    assert target_layers(tmp_path, 12, nest) == (2, 6, 9)


def test_the_authors_own_checkpoints_name_plain_llama(tmp_path: Path) -> None:
    folder = written(tmp_path / "head", Layout(), put("architectures", ["LlamaForCausalLM"]))
    config = head_config("head", folder, find_model(str(folder)).hf_config, TARGET)
    assert config.prefix == "midlayer" and config.draft_vocab_size == 61


@pytest.mark.parametrize("head", ["tiny-draft", "shape:qwen3-0.6b"])
def test_a_model_is_no_head(head: str) -> None:
    with pytest.raises(EngineError, match="no EAGLE-3 head"):
        open_small(speculate=f"eagle3:{head}:3")


def test_several_devices_are_refused() -> None:
    with pytest.raises(EngineError, match="--tp"):
        _ = EngineConfig(speculate="eagle3:head:3", tp=2).speculation
