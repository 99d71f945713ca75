"""The check against the torch backend passes right engines and catches slightly wrong ones."""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from engine_fixtures import SmallSource, loud_weights, open_small

from backbench.backends import registry
from backbench.backends.interface import Backend, Scheme, Weight
from backbench.backends.interface.device import cpu, detect
from backbench.backends.torch.attention import TorchAttention, TorchRunner
from backbench.backends.torch.linear import TorchLinear
from backbench.engine.config import EngineConfig
from backbench.engine.engine import Engine
from backbench.engine.models.checkpoint import find_model
from backbench.engine.models.weights import Weights
from backbench.harness.commands.run import exit_code
from backbench.harness.experiment import Outcome
from backbench.reports.record import RunDirectory, RunRecord
from backbench.workloads.request import Request, Workload

correctness: Any = importlib.import_module("backbench.harness.correctness.check")


def checked(engine: Any, longest: int | None = None) -> dict[str, Any]:
    source: Any = SmallSource()
    return correctness.check(engine, source, longest)


def spoiled_by(change: Callable[[Weights], None], reference_too: bool = False) -> Engine:
    """The small engine on weights that `change` spoiled, and the reference on right ones, or on the same."""
    engine = open_small()
    wrong = copy.deepcopy(loud_weights())
    change(wrong)
    source: Any = SmallSource()
    spoiled = Engine.open(
        source, backend="torch", device=engine.selection.device, config=engine.config, weights=wrong
    )
    spoiled.weights = wrong if reference_too else loud_weights()
    return spoiled


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


class OwnLayout(TorchLinear):
    """Packs quantized weights its own way; `fault` is what it then gets wrong."""

    def __init__(self, fault: Callable[[Weight], Weight] = lambda weight: weight) -> None:
        self.fault = fault

    def pack(self, weight: Weight, device: Any) -> Any:
        if weight.scheme == Scheme():
            return super().pack(weight, device)
        return {"rows": weight.q.flip(0).contiguous(), "rest": replace(weight, q=weight.q[:0])}

    def unpack(self, packed: Any) -> Weight | None:
        return replace(packed["rest"], q=packed["rows"].flip(0)) if isinstance(packed, dict) else None

    def run(self, x: Any, packed: Any, bias: Any = None) -> Any:
        weight = self.unpack(packed)
        return super().run(x, packed if weight is None else self.fault(weight), bias)


def of_own_layout(scheme: str, linear: OwnLayout, monkeypatch: pytest.MonkeyPatch) -> Engine:
    loaded, backend = registry.load, Backend("own", "", linear=linear)
    monkeypatch.setattr(registry, "load", lambda name: backend if name == "own" else loaded(name))
    config = EngineConfig(quantize=scheme, max_seqs=4, max_len=256, num_blocks=64)
    return Engine.open(find_model("tiny"), backend="own", device=cpu(), config=config)


@pytest.mark.parametrize("scheme", ["int8", "int4-g128", "fp8", "nvfp4"])
def test_quantized_weights_are_checked_against_torch_on_the_same_ones(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = of_own_layout(scheme, OwnLayout(), monkeypatch)
    found = correctness.check(engine, find_model("tiny"))
    assert found["passed"] is True, found
    assert found["products"]["products"] == 20 and found["products"]["worst_share_of_limit"] < 1
    if scheme != "fp8":  # whose rows are rounded
        assert found["tolerance"] < 0.1  # rounding, and not what quantization costs


@pytest.mark.parametrize(
    ("scheme", "fault"),
    [
        ("int4-g128", lambda w: replace(w, scale=w.scale.roll(1, 0))),
        ("int4-g128", lambda w: replace(w, q=(w.q >> 4) | (w.q << 4))),
        ("fp8", lambda w: replace(w, scale=w.scale * 1.001)),
        ("fp8", lambda w: replace(w, scheme=replace(w.scheme, activation=None))),
        ("int8-w8a8", lambda w: replace(w, q=torch.cat([w.q[:-1], w.q[:1]]))),
    ],
    ids=["rows' scales", "nibbles", "a thousandth", "rows not rounded", "last row"],
)
def test_a_quantized_weight_mistaken_is_caught(
    scheme: str, fault: Callable[[Weight], Weight], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = of_own_layout(scheme, OwnLayout(fault), monkeypatch)
    found = correctness.check(engine, find_model("tiny"))
    assert found["passed"] is False
    assert found["reason"].startswith("a product differs from torch's in layer ")
    assert f"as {scheme}, " in found["reason"]


class LoudValues(TorchRunner):
    """Stores values a sixth too large."""

    def write(self, cache: Any, k: Any, v: Any, batch: Any) -> None:
        super().write(cache, k, v * 7 / 6, batch)


class LoudAttention(TorchAttention):
    def open(self, spec: Any, device: Any) -> LoudValues:
        return LoudValues(spec, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kept", ["fp8", "int8"])
def test_a_cache_of_bytes_is_checked_against_torchs(
    kept: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(kv_dtype=kept, max_seqs=4, max_len=256, num_blocks=64)

    def found(backend: str) -> dict[str, Any]:
        source = find_model("tiny")
        engine = Engine.open(source, backend=backend, device=cpu(), config=config, dtype=dtype)
        return correctness.check(engine, source)

    right = found("torch")
    assert right["passed"] is True, right
    loaded, backend = registry.load, Backend("loud", "", attention=LoudAttention())
    monkeypatch.setattr(registry, "load", lambda name: backend if name == "loud" else loaded(name))
    wrong = found("loud")
    assert wrong["passed"] is False and "value of head" in wrong["reason"]


@pytest.mark.parametrize("part", ["qkv", "attention_output", "gate_up", "down"])
def test_a_weight_off_by_one_percent_is_caught(part: str) -> None:
    """The engine under test computes with one matrix of one layer scaled; the reference does not."""
    found = checked(spoiled_by(lambda wrong: getattr(wrong.layers[1], part).q.mul_(1.01)))
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


def set_weight(value: float) -> Callable[[Weights], None]:
    def change(weights: Weights) -> None:
        weights.layers[0].down.q[0, 0] = value

    return change


def test_not_a_number_is_named_with_whose_it_is_and_where() -> None:
    found = checked(spoiled_by(set_weight(float("nan"))))
    assert found["passed"] is False
    assert found["reason"].startswith(
        "the log-probabilities of torch are NaN at position 1 after a prompt of 1 tokens"
    )
    assert "top1_agreement" not in found and "max_abs_logprob_diff" not in found


def test_a_reference_without_numbers_is_named_too() -> None:
    found = checked(spoiled_by(set_weight(float("inf")), reference_too=True))
    assert found["passed"] is False
    assert "of torch, the torch backend, torch in float64 are NaN" in found["reason"]
    assert "weights" in found["reason"]


def test_an_infinite_value_is_called_so() -> None:
    texts = [correctness.Text([1, 2], [3, 4]), correctness.Text([5], [6, 7])]
    found = correctness.not_finite("sdpa", np.array([-1.0, -2.0, -3.0, -np.inf]), texts)
    assert found == (
        "the log-probabilities of sdpa are infinite at position 2 after a prompt of 1 tokens "
        "(1 of 4 are not finite)"
    )
    assert correctness.not_finite("sdpa", np.zeros(4), texts) == ""


def test_a_pool_too_small_for_the_sample_is_said() -> None:
    found = checked(open_small(num_blocks=4))
    assert found["passed"] is None
    assert "too small" in found["reason"]


def test_the_record_keeps_the_differences_its_totals_come_from() -> None:
    found = checked(open_small(max_step_tokens=16, prefill_chunk=5))
    each = np.array(found["differences"])
    assert len(each) == found["tokens"] <= 10 * correctness.OUTPUTS
    assert found["mean_abs_logprob_diff"] == float(each.mean())
    assert found["max_abs_logprob_diff"] == float(each.max())
    by_sequence = each.reshape(found["sequences"], -1).mean(axis=1)
    assert found["worst_sequence_mean_abs_logprob_diff"] == float(by_sequence.max())
    assert json.loads(json.dumps(found)) == found


def test_bounds_are_stated_multiples_of_the_noise_of_the_dtype() -> None:
    source = find_model("tiny-draft")
    config = EngineConfig(max_seqs=16, num_blocks=512)
    noise = {}
    for dtype in (torch.bfloat16, torch.float32):
        engine = Engine.open(source, backend="torch", device=cpu(), dtype=dtype, config=config)
        found = correctness.check(engine, source)
        assert found["passed"] is True, found
        assert found["tolerance_mean"] == correctness.FACTORS.mean * found["noise_mean"]
        assert found["tolerance"] == correctness.FACTORS.maximum * found["noise_max"]
        noise[dtype] = found["noise_mean"]
    assert noise[torch.bfloat16] > 1000 * noise[torch.float32] > 0


def test_the_sample_is_fixed_and_fits_the_context() -> None:
    sample = correctness.prompts(97, 128)
    assert sample == correctness.prompts(97, 128)
    assert max(map(len, sample)) + correctness.OUTPUTS <= 128
    assert correctness.prompts(97, 8) == [sample[0]]


def test_the_sample_reaches_the_longest_context_of_the_run() -> None:
    sample = correctness.prompts(97, 5000, 3000)
    assert max(map(len, sample)) + correctness.OUTPUTS == 3000
    assert sample[:-1] == correctness.prompts(97, 5000)
    found = checked(open_small(), 128)
    assert found["longest_sequence"] == 128
    assert found["attention"]["longest_context"] == 128


def test_a_long_sequence_stops_where_a_reference_pass_would_take_minutes() -> None:
    config = find_model("shape:llama-3.1-8b").config
    assert correctness._affordable(config, 3000, 1.5e14) == 3000
    reached = correctness._affordable(config, 100_000, 1.5e14)
    assert 3000 < reached < 20_000
    assert reached * config.flops_per_token(reached // 2) <= 1.5e14


def test_the_longest_context_is_that_of_the_longest_request() -> None:
    requests = (
        Request(0, 0, (1, 2, 3), 4),
        Request(1, 0, (1,), 9),
    )
    assert correctness.longest_context(Workload("w", requests)) == 10


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
