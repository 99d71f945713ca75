"""Perplexity, KL divergence and agreement of two models, against plain arithmetic on transformers' logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from backbench.backends.interface.device import cpu
from backbench.engine import perplexity
from backbench.engine.calibration.samples import Sample
from backbench.engine.models.checkpoint import find_model
from backbench.engine.models.decoder import Decoder
from backbench.errors import HarnessError
from backbench.harness import accuracy
from backbench.harness.accuracy import Setting, Unquantized
from backbench.harness.options import RunOptions
from backbench.harness.subjects.engine import EngineSubject

FIXTURES = Path(__file__).parents[1] / "engine" / "models" / "fixtures"
RELATIVE = 1e-4
"""Logits in fp32, of two implementations, through two layers."""

Expected = dict[str, list[float]]
Two = tuple[Decoder, Decoder, Sample, Expected]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Two:
    """Two models that differ, sequences, and the sums that each sequence must give."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    models = [AutoModelForCausalLM.from_config(config).eval() for _ in range(2)]
    setting, decoders = Setting("torch", cpu(), torch.float32, {}, 40), []
    for place, model in enumerate(models):
        folder = tmp_path_factory.mktemp(f"model{place}")
        model.save_pretrained(folder)
        decoders.append(setting.open(find_model(str(folder))).decoder)
    sample = Sample([torch.randint(60, (n,)).tolist() for n in (2, 23, 40)], "random", "")
    expected: Expected = {name: [] for name in accuracy.SUMS}
    for ids in sample.sequences:
        with torch.inference_mode():
            p, q = (model(torch.tensor([ids])).logits[0].double().softmax(-1).numpy() for model in models)
        places = range(len(ids) - 1)
        expected["tokens"].append(len(places))
        expected["nll_unquantized"].append(-sum(np.log(p[i, ids[i + 1]]) for i in places))
        expected["nll"].append(-sum(np.log(q[i, ids[i + 1]]) for i in places))
        expected["kl_divergence"].append(sum((p[i] * np.log(p[i] / q[i])).sum() for i in places))
        expected["top1_agreements"].append(sum(p[i].argmax() == q[i].argmax() for i in places))
    return *decoders, sample, expected


def found(two: Two) -> Expected:
    with Unquantized(two[0], two[2]) as unquantized:
        return unquantized.compare(two[1])


def is_right(found: Expected, expected: Expected) -> bool:
    return all(found[name] == pytest.approx(expected[name], rel=RELATIVE) for name in accuracy.SUMS)


def test_sums_of_each_sequence(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "LOGIT_ROWS", 7)
    assert is_right(found(two), two[3])


def test_a_model_beside_itself_loses_nothing(two: Two) -> None:
    with Unquantized(two[0], two[2]) as unquantized:
        same = unquantized.compare(two[0])
    assert same["kl_divergence"] == [0.0] * 3
    assert same["top1_agreements"] == same["tokens"] == [1, 22, 39]
    assert same["nll"] == same["nll_unquantized"]


Predictions = Iterator[tuple[Tensor, Tensor]]


def shifted(decoder: Decoder, ids: Any) -> Predictions:
    return ((logits, following.roll(1)) for logits, following in perplexity.predictions(decoder, ids))


def unshifted(decoder: Decoder, ids: Any) -> Predictions:
    tokens = torch.tensor(ids[:-1])
    return ((logits, tokens) for logits, _ in perplexity.predictions(decoder, ids))


def without_the_last(decoder: Decoder, ids: Any) -> Predictions:
    return ((logits[:-1], following[:-1]) for logits, following in perplexity.predictions(decoder, ids))


def backwards(was: Tensor, now: Tensor, following: Tensor) -> Tensor:
    there, back = accuracy_sums(was, now, following), accuracy_sums(now, was, following)
    return torch.where(torch.tensor([name == "kl_divergence" for name in accuracy.SUMS]), back, there)


accuracy_sums = accuracy.sums


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("predictions", shifted),
        ("predictions", unshifted),
        ("predictions", without_the_last),
        ("sums", backwards),
        ("sums", lambda was, now, following: accuracy_sums(now, now, following)),
        ("sums", lambda was, now, following: accuracy_sums(now, was, following)),
    ],
    ids=["shifted", "unshifted", "last dropped", "KL backwards", "against itself", "models swapped"],
)
def test_planted_faults_are_seen(
    two: Two, monkeypatch: pytest.MonkeyPatch, name: str, fault: Callable[..., Any]
) -> None:
    monkeypatch.setattr(accuracy, name, fault)
    assert not is_right(found(two), two[3])


def test_a_full_disk_is_one_line(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("r+b", buffering=0) as full:
        monkeypatch.setattr(accuracy.tempfile, "TemporaryFile", lambda: full)
        with pytest.raises(HarnessError, match=r"logits do not fit .*: No space left on device; free some"):
            Unquantized(two[0], two[2])


def options(**given: Any) -> RunOptions:
    return RunOptions(workload="batch:2x8+4", backend="torch", **given)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({}, "nothing is quantized"),
        ({"quantize": "int8", "accuracy": "none"}, "it was not asked for: --accuracy none"),
        ({"quantize": "int8", "check": False}, "it was not asked for: "),
        (
            {"model": str(FIXTURES / "ct-w8a16")},
            "the checkpoint is quantized already, and no --against names",
        ),
    ],
)
def test_what_is_not_measured_says_why(given: dict[str, Any], reason: str) -> None:
    section = EngineSubject(options(**given)).accuracy()
    assert list(section) == ["reason"] and section["reason"].startswith(reason)


def test_a_model_that_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = EngineSubject(options(quantize="int8"))
    monkeypatch.setattr(type(subject.source.config), "num_parameters", 10**15)
    assert subject.accuracy()["reason"].startswith("tiny takes 3725290.3 GiB unquantized, and the device has")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"quantize": "int8", "accuracy": "no/such.txt"}, "no/such.txt cannot be read as UTF-8 text"),
        ({"quantize": "int8", "against": "tiny-draft"}, "tiny-draft has a .* it is not the same model"),
        ({"quantize": "int8", "against": str(FIXTURES / "ct-w8a16")}, "is quantized itself .*; name a dense"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_the_run(given: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        EngineSubject(options(**given))


@pytest.mark.parametrize("kept", ["fp8", "int8"])
def test_a_quantized_kv_cache_is_compared_with_one_that_is_not(kept: str) -> None:
    subject = EngineSubject(options(engine={"kv_dtype": kept, "max_len": 32}))
    subject._engine = Setting("torch", cpu(), torch.float32, {}, 32).open(find_model("tiny"), kv_dtype=kept)
    section = subject.accuracy()
    assert section["against"] == "tiny"
    assert 0 < section["kl_divergence"]["value"] < 0.1
