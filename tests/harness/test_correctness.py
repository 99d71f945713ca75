"""The check against the torch backend passes right engines and catches slightly wrong ones."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from engine_fixtures import SmallSource, loud_weights, open_small

from backbench.backends.interface.device import cpu, detect
from backbench.engine.config import EngineConfig
from backbench.engine.engine import Engine
from backbench.engine.models.checkpoint import find_model
from backbench.harness import correctness
from backbench.harness.commands.run import exit_code
from backbench.harness.experiment import Outcome
from backbench.reports.record import RunDirectory, RunRecord


def checked(engine: Any) -> dict[str, Any]:
    source: Any = SmallSource()
    return correctness.check(engine, source)


def test_the_reference_agrees_with_itself_chunked_and_cached() -> None:
    """Other chunks and blocks than the reference's: equal up to fp32 rounding."""
    engine = open_small(max_step_tokens=16, prefill_chunk=5)
    found = checked(engine)
    assert found["passed"] is True
    assert found["against_itself"] is True
    assert found["top1_agreement"] > 0.95
    assert found["tokens"] == found["sequences"] * correctness.OUTPUTS
    assert found["max_abs_logprob_diff"] <= found["tolerance"]
    assert not engine.has_work
    assert engine.take_step_stats() == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
@pytest.mark.parametrize("model", ["tiny", "tiny-draft"])
def test_triton_scores_the_bundled_models_text_within_bf16_noise(model: str) -> None:
    source = find_model(model)
    engine = Engine.open(
        source,
        backend="triton",
        device=detect(),
        dtype=torch.bfloat16,
        config=EngineConfig(max_seqs=16, num_blocks=512),
    )
    found = correctness.check(engine, source)
    assert found["passed"] is True, found
    assert found["against_itself"] is False


@pytest.mark.parametrize("part", ["qkv", "attention_output", "gate_up", "down"])
def test_a_weight_off_by_one_percent_is_caught(part: str) -> None:
    """The engine under test computes with one matrix of one layer scaled; the reference does not."""
    engine = open_small()
    right = loud_weights()
    wrong = copy.deepcopy(right)
    getattr(wrong.layers[1], part).q.mul_(1.01)
    source: Any = SmallSource()
    spoiled = type(engine).open(
        source, backend="torch", device=engine.selection.device, config=engine.config, weights=wrong
    )
    spoiled.weights = right
    found = checked(spoiled)
    assert found["passed"] is False
    assert found["max_abs_logprob_diff"] > found["tolerance_mean"]


@pytest.mark.parametrize("model", ["tiny", "tiny-draft"])
def test_another_right_kernel_passes_in_bf16(model: str) -> None:
    """tiny-draft has two layers: the roundings of its final norm and logits are half of all."""
    source = find_model(model)
    config = EngineConfig(max_seqs=16, num_blocks=512)
    engine = Engine.open(source, backend="sdpa", device=cpu(), dtype=torch.bfloat16, config=config)
    found = correctness.check(engine, source)
    assert found["passed"] is True, found
    assert found["mean_abs_logprob_diff"] > 0


@pytest.mark.parametrize("model", ["tiny", "tiny-draft"])
def test_a_scale_off_by_five_percent_is_caught_in_bf16(model: str) -> None:
    """Attention's softmax scale, which only shifts weights between keys."""
    source = find_model(model)
    config = EngineConfig(max_seqs=16, num_blocks=512)
    engine = Engine.open(source, backend="sdpa", device=cpu(), dtype=torch.bfloat16, config=config)
    for runner in engine.decoder.runners.values():
        runner.spec = replace(runner.spec, scale=1.05 * runner.spec.scale)
    found = correctness.check(engine, source)
    assert found["passed"] is False, found


def test_not_a_number_fails() -> None:
    engine = open_small()
    wrong = copy.deepcopy(loud_weights())
    wrong.layers[0].down.q[0, 0] = float("nan")
    source: Any = SmallSource()
    spoiled = type(engine).open(
        source, backend="torch", device=engine.selection.device, config=engine.config, weights=wrong
    )
    spoiled.weights = loud_weights()
    assert checked(spoiled)["passed"] is False


def test_a_pool_too_small_for_the_sample_is_said() -> None:
    found = checked(open_small(num_blocks=4))
    assert found["passed"] is None
    assert "too small" in found["reason"]


def test_tolerance_follows_the_dtype() -> None:
    reference = np.array([-5.0, -3.0])
    wide = correctness.tolerance(torch.bfloat16, 36, reference)
    narrow = correctness.tolerance(torch.float32, 36, reference)
    assert wide.mean > 100 * narrow.mean
    assert wide.mean < wide.sequence_mean < wide.maximum < 2.0


def test_the_sample_is_fixed_and_fits_the_context() -> None:
    sample = correctness.prompts(97, 128)
    assert sample == correctness.prompts(97, 128)
    assert max(map(len, sample)) + correctness.OUTPUTS <= 128
    assert correctness.prompts(97, 8) == [sample[0]]


@pytest.mark.parametrize(
    ("status", "passed", "validity", "code"),
    [
        ("complete", True, [], 0),
        ("complete", False, ["wrong results"], 5),
        ("complete", True, ["3 requests failed"], 4),
        ("interrupted", None, ["interrupted"], 130),
    ],
)
def test_exit_codes(tmp_path: Any, status: str, passed: bool | None, validity: list[str], code: int) -> None:
    record = RunRecord(run={"status": status}, correctness={"passed": passed}, validity=validity)
    assert exit_code(Outcome(RunDirectory(tmp_path), record)) == code
