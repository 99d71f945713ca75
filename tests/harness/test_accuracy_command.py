"""`bench accuracy` on the bundled model, on a CPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from backbench.harness.cli import run_command

FIXTURE = Path(__file__).parents[1] / "engine" / "models" / "fixtures" / "ct-w8a16"
TINY = Path(__file__).parents[2] / "engine" / "checkpoints" / "tiny"


def measured(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert run_command(["accuracy", "--json", *arguments]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_eight_bits_of_tiny_are_within_one_percent(capsys: pytest.CaptureFixture[str]) -> None:
    found = measured(capsys, "--quantize", "none,int8,fp8,int4-g32", "--dtype", "bf16", "--tokens", "2048")
    int8, fp8, int4 = found["schemes"]
    assert [each["scheme"] for each in (int8, fp8, int4)] == ["int8", "fp8", "int4-g32"]
    for each in (int8, fp8):
        change = each["perplexity_change"]
        assert max(abs(change["low"]), abs(change["high"])) < 0.01
        assert each["weights_bytes"] < 0.8 * found["weights_bytes_unquantized"]
    losses = [each["kl_divergence"]["value"] for each in (int8, fp8, int4)]
    assert 0 < losses[0] < losses[1] < losses[2]
    assert found["tokens"] == 16 * 127 and found["corpus"] == "pydoc_data.topics"
    assert 50 < int8["perplexity_unquantized"]["value"] < 200


def test_without_a_tokenizer_the_model_draws_its_own_text(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(TINY / name, tmp_path / name)
    short = ("--quantize", "int8", "--tokens", "128", "--length", "32")
    found = measured(capsys, "-m", str(tmp_path), *short)
    assert found["corpus"].startswith("sampled from ") and found["tokens"] == 4 * 31
    again = measured(capsys, "-m", "tiny", "--text", "sampled", *short)
    assert again["corpus_sha256"] == found["corpus_sha256"]
    assert again["schemes"][0]["sequences"] == found["schemes"][0]["sequences"]


def test_a_users_text_and_sparse_weights(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It was a bright cold day, and the clocks were striking. " * 20)
    arguments = ("--text", str(text), "--length", "32", "--tokens", "96")
    found = measured(capsys, "--sparsity", "2:4", *arguments)
    (sparse,) = found["schemes"]
    assert "2:4" in sparse["scheme"] and sparse["kl_divergence"]["value"] > 0.1
    assert run_command(["accuracy", "--sparsity", "2:4", *arguments]) == 0
    said = capsys.readouterr().out
    assert "KL divergence" in said and "text.txt" in said and "float32" in said


def test_a_quantized_checkpoint_is_compared_with_the_named_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = AutoConfig.from_pretrained(FIXTURE)
    del config.quantization_config
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.float32).save_pretrained(tmp_path)
    short = ("--tokens", "64", "--length", "32")
    found = measured(capsys, "-m", str(FIXTURE), "--against", str(tmp_path), *short)
    assert found["schemes"][0]["kl_divergence"]["value"] > 1e-5
    assert found["schemes"][0]["weights_bytes"] < found["weights_bytes_unquantized"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Nothing changes what tiny answers; give --quantize"),
        (("--quantize", "none"), "Nothing changes what tiny answers; give --quantize"),
        (("--quantize", "int5"), "--quantize takes none, int8,"),
        (
            ("-m", str(FIXTURE)),
            "is quantized already (int8(group=128)); name the unquantized model with --against",
        ),
        (("--quantize", "int8", "--text", "no.txt"), "no.txt cannot be read as UTF-8 text"),
    ],
)
def test_what_cannot_be_is_one_line(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["accuracy", *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line and len(line) < 300
