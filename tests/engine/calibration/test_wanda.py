"""`--sparsity-method wanda`: the zeros that `bench quantize` makes so, made while weights are loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from backbench.backends.interface import PackedWeight, Scheme, Weight
from backbench.backends.interface.device import cpu
from backbench.backends.quantization import dequantize
from backbench.engine.calibration import wanda
from backbench.engine.calibration.recipe import Recipe
from backbench.engine.calibration.samples import sampled_sequences
from backbench.engine.calibration.writing import write_quantized
from backbench.engine.config import EngineConfig
from backbench.engine.engine import Engine
from backbench.engine.models.checkpoint import DirectorySource, find_model
from backbench.errors import EngineError

LENGTH, SEQUENCES = 24, 3


@pytest.fixture(autouse=True)
def little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wanda, "LENGTH", LENGTH)
    monkeypatch.setattr(wanda, "SEQUENCES", SEQUENCES)


def weights_of(**settings: object) -> dict[str, torch.Tensor]:
    """Layer and role -> the numbers of every product, f32 [n, k]."""
    config = EngineConfig(max_seqs=1, max_len=64, num_blocks=8, **settings)
    source = wanda.calibrated(find_model("tiny"), config, cpu())
    weights = Engine.open(source, backend="torch", device=cpu(), config=config).weights
    found = {}
    for index, (role, held) in enumerate(weights.products()):
        weight = held.canonical() if isinstance(held, PackedWeight) else held
        assert isinstance(weight, Weight)
        found[f"{index} {role}"] = dequantize(weight, torch.float32)
    return found


@pytest.mark.parametrize("sparsity", ["2:4", "unstructured:0.6"])
def test_it_makes_the_zeros_of_bench_quantize(sparsity: str, tmp_path: Path) -> None:
    tiny = find_model("tiny")
    assert isinstance(tiny, DirectorySource)
    sequences = sampled_sequences(tiny, cpu(), None, LENGTH, SEQUENCES, seed=1)
    recipe = Recipe(Scheme(sparsity=sparsity), sparsity_method="wanda")
    write_quantized(tiny, tmp_path / "made", recipe, cpu(), sequences=sequences)
    config = EngineConfig(max_seqs=1, max_len=64, num_blocks=8)
    made = Engine.open(find_model(str(tmp_path / "made")), backend="torch", device=cpu(), config=config)
    loaded = weights_of(sparsity=sparsity, sparsity_method="wanda")
    plain = weights_of(sparsity=sparsity)
    different = 0
    for (name, one), (_, held) in zip(loaded.items(), made.weights.products(), strict=True):
        weight = held.canonical() if isinstance(held, PackedWeight) else held
        assert isinstance(weight, Weight)
        other = dequantize(weight, torch.float32)
        if "head" in name:
            continue
        assert torch.equal(one, other), name
        different += int(((one == 0) != (plain[name] == 0)).sum())
        zeros = (one == 0).float().mean()
        assert zeros >= (0.5 if sparsity == "2:4" else 0.59)
        if sparsity == "2:4":
            assert bool(((one == 0).view(-1, 4).sum(1) >= 2).all())
    assert different > 0


def test_zeros_stay_where_weights_are_rounded_as_well() -> None:
    found = weights_of(sparsity="2:4", sparsity_method="wanda", quantize="int8")
    dense = weights_of()
    for name, numbers in found.items():
        if "head" not in name:
            assert bool(((numbers == 0).view(-1, 4).sum(1) >= 2).all()), name
            assert not torch.equal(numbers, dense[name])


def test_another_text_gives_other_zeros(tmp_path: Path) -> None:
    text = tmp_path / "mine.txt"
    text.write_text("0123456789 " * 200)
    asked = {"sparsity": "2:4", "sparsity_method": "wanda"}
    own, given = weights_of(**asked), weights_of(**asked, calibrate=str(text))
    assert any(not torch.equal(own[name], given[name]) for name in own)


def test_the_head_is_pruned_by_its_own_inputs() -> None:
    asked = {"sparsity": "2:4", "quantize_head": True}
    head = next(name for name in weights_of(sparsity="2:4") if "head" in name)
    by_magnitude, by_inputs = weights_of(**asked)[head], weights_of(**asked, sparsity_method="wanda")[head]
    assert bool(((by_inputs == 0).view(-1, 4).sum(1) >= 2).all())
    assert not torch.equal(by_magnitude == 0, by_inputs == 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity_method": "wanda"}, "--sparsity-method says which weights become 0; give --sparsity"),
        ({"sparsity": "2:4", "calibrate": "topics"}, "--calibrate has nothing to serve"),
    ],
)
def test_what_says_nothing_is_refused(settings: dict[str, str], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        weights_of(**settings)


def test_random_weights_are_refused() -> None:
    config = EngineConfig(sparsity="2:4", sparsity_method="wanda")
    with pytest.raises(EngineError, match="random weights, whose inputs say nothing"):
        wanda.calibrated(find_model("shape:qwen3-0.6b"), config, cpu())


def test_inputs_that_nobody_measured_are_missed() -> None:
    config = EngineConfig(sparsity="2:4", sparsity_method="wanda")
    with pytest.raises(EngineError, match="measures inputs first"):
        Engine.open(find_model("tiny"), backend="torch", device=cpu(), config=config)
