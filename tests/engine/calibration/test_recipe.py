"""What recipes refuse, and Wanda's choice of zeros."""

from __future__ import annotations

import pytest
import torch

from backbench.backends.interface import Scheme
from backbench.backends.quantization import SCHEMES
from backbench.engine.calibration.inputs import InputStatistics
from backbench.engine.calibration.recipe import Recipe
from backbench.errors import EngineError

SPARSE = Scheme(sparsity="2:4")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((Scheme(),), "give --scheme, --sparsity or both"),
        ((SPARSE, "gptq"), "give --scheme, too"),
        ((SCHEMES["int8"], "rtn", "wanda"), "give --sparsity, too"),
        ((SCHEMES["int8"], "awk"), "--method takes rtn or gptq or awq; not 'awk'"),
        ((SPARSE, "rtn", "random"), "--sparsity-method takes magnitude or wanda; not 'random'"),
        ((SCHEMES["fp8"], "awq"), "take a scheme of weights alone"),
    ],
)
def test_parts_that_contradict_each_other(arguments, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        Recipe(*arguments)


@pytest.mark.parametrize("sparsity", ["2:4", "unstructured:0.7"])
def test_wanda_compares_weights_times_norms_by_row(sparsity: str) -> None:
    """Sun et al. 2024, equation 1, element by element; rows of very different sizes lose as many."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(6, 40, generator=generator) * 10.0 ** torch.arange(6)[:, None]
    rows = torch.randn(64, 40, generator=generator) * torch.rand(40, generator=generator) ** 3
    statistics = InputStatistics()
    statistics.add(rows)
    recipe = Recipe(Scheme(sparsity=sparsity), sparsity_method="wanda")
    found = recipe.prune_weight(dense, statistics)
    score = dense.abs() * rows.norm(dim=0)
    width, zeros = (4, 2) if sparsity == "2:4" else (40, 28)
    for row, of_row, whole in zip(found, score, dense, strict=True):
        for start in range(0, 40, width):
            part = slice(start, start + width)
            lost = of_row[part].argsort()[:zeros]
            assert sorted((row[part] == 0).nonzero().flatten().tolist()) == sorted(lost.tolist())
            assert torch.equal(row[part][row[part] != 0], whole[part][row[part] != 0])
    assert not torch.equal(found, Recipe(Scheme(sparsity=sparsity)).prune_weight(dense, None))
