"""What the record says of tuned launches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from backbench.backends.interface import Crossover, Device
from backbench.backends.triton.attention import TritonAttention
from backbench.backends.triton.linear import TritonLinear
from backbench.backends.triton.operations import TritonOperations
from backbench.engine.limits import StepLimits
from backbench.engine.models.checkpoint import find_model
from backbench.engine.models.decoder import attention_specs
from backbench.harness.sections import beside_dense, tuned, tuning_text


def engine(model: str, arch: str = "sm90", block_size: int = 64) -> Any:
    """What the section reads of an engine of the Triton backend, on a GPU that is not there."""
    config = find_model(model).config
    limits = StepLimits(
        block_size=block_size, max_len=4096, max_seqs=256, max_step_tokens=7936, prefill_chunk=7936
    )
    specs = attention_specs(config, dtype=torch.bfloat16, limits=limits)
    device = Device("nvidia", arch, "imagined", 132, 2**37, 227 * 1024, torch.device("cpu"))
    return SimpleNamespace(
        selection=SimpleNamespace(
            device=device,
            attention=TritonAttention(),
            linear=TritonLinear(),
            operations=TritonOperations(),
            weights=config.spec.weight_specs(torch.bfloat16),
        ),
        decoder=SimpleNamespace(dtype=torch.bfloat16, runners=dict.fromkeys(specs)),
        model_config=config,
    )


def test_the_text_counts_shapes_and_names_each_reason_once() -> None:
    assert tuning_text([]) is None
    assert tuning_text([None, None]) is None
    assert tuning_text([{"a": None}, None, {"b": None}]) == "tuned"
    said = tuning_text([{"a": None, "b": "no entry for sm90-132"}, {"c": "no entry for sm90-132"}])
    assert said == "untuned: 2 of 3 shapes, no entry for sm90-132"


@pytest.mark.parametrize("model", ["shape:qwen3-8b", "shape:qwen3-0.6b"])
def test_the_published_models_are_tuned(model: str) -> None:
    assert tuned(engine(model)) == {"attention": "tuned", "linear": "tuned", "operations": None}


def test_other_models_and_devices_are_not() -> None:
    other = tuned(engine("shape:llama-3.1-8b"))
    assert other["attention"] == "tuned"
    assert other["linear"] == "untuned: 44 of 80 shapes, no entry for sm90-132"
    elsewhere = tuned(engine("shape:qwen3-8b", arch="sm100"))
    assert elsewhere["linear"] == "untuned: 80 of 80 shapes, no entry for sm100-132"
    assert elsewhere["attention"] == "untuned: 3 of 3 shapes, no entry for sm100-132"


def test_a_roles_crossover_is_that_of_its_worst_layer() -> None:
    """A layer that nobody measured leaves nothing to say."""
    worse, better = Crossover(64, 128, "dequantized"), Crossover(128, 256, "tile kernel 128x128")
    said = {
        "faster_than_dense_up_to_rows": 64,
        "slower_than_dense_from_rows": 128,
        "served_beyond": "dequantized",
    }
    assert beside_dense([better, worse, better]) == said
    assert set(beside_dense([better, None]).values()) == set(beside_dense([]).values()) == {None}
    assert beside_dense([Crossover(0, 1, "x"), better])["faster_than_dense_up_to_rows"] == 0
