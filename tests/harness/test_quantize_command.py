"""`bench quantize`: what it writes, and what it refuses in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from backbench.engine.models.checkpoint import find_model
from backbench.errors import USAGE
from backbench.harness.cli import run_command


def quantized(*arguments: str) -> int:
    return run_command(["quantize", "tiny-draft", *arguments])


def test_a_calibrated_checkpoint_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    short = ("--sequences", "2", "--length", "16")
    assert quantized("--scheme", "int4-g32", "--method", "gptq", *short, "--out", str(out)) == 0
    printed = capsys.readouterr()
    assert "int4-g32" in printed.out and "sampled from tiny-draft, seed 1" in printed.out
    assert printed.err.splitlines() == ["layer 1 of 1"]
    made = json.loads((out / "quantize.json").read_text())
    assert made["model"] == "tiny-draft" and made["method"] == "gptq" and made["sparsity_method"] is None
    assert made["calibration"]["sequences"] == 2 and len(made["calibration"]["sha256"]) == 64
    assert find_model(str(out)).has_tokenizer
    assert run_command(["perplexity", "-m", str(out), "--limit", "1", "--length", "16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"]["quantization"] == "int4-g32"


def test_a_user_s_text_and_zeros_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It was a bright cold day, and the clocks were striking. " * 20)
    sparse = ("--sparsity", "2:4", "--sparsity-method", "wanda", "--length", "32")
    assert quantized(*sparse, "--calibrate", str(text), "--json", "--out", str(tmp_path / "out")) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["quantization"] is None and printed["num_bytes"] > 10**6
    made = json.loads((tmp_path / "out" / "quantize.json").read_text())
    assert made["calibration"]["source"].endswith("text.txt") and made["scheme"] is None
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    capsys.readouterr()
    of_text = ("--text", str(text), "--tokens", "62", "--length", "32", "--json")
    assert run_command(["accuracy", "-m", str(tmp_path / "out"), "--against", "tiny-draft", *of_text]) == 0
    (row,) = json.loads(capsys.readouterr().out)["schemes"]
    assert row["scheme"] == "dense" and row["kl_divergence"]["value"] > 0.05, row


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --scheme, --sparsity or both"),
        (("--scheme", "int5"), "there are int8"),
        (("--scheme", "none"), "give --scheme, --sparsity or both"),
        (("--scheme", "int8", "--method", "best"), "--method takes"),
        (("--scheme", "int8", "--prune", "wanda"), "--sparsity-method wanda says which weights"),
        (("--scheme", "int8", "--calibrate", "self"), "--calibrate has nothing to serve"),
        (("--scheme", "int8", "--method", "gptq", "--calibrate", "/nowhere.txt"), "cannot be read"),
        (("--scheme", "int8", "--sparsity", "3:4"), "--sparsity takes 2:4"),
        (("--scheme", "fp8", "--method", "awq"), "--method awq"),
    ],
)
def test_contradictions_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    refused(capsys, message, "tiny-draft", *arguments, "--out", str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_models_and_places_that_do_not_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = ("--scheme", "int8", "--out")
    refused(capsys, "has random weights", "shape:qwen3-8b", *plain, str(tmp_path / "out"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    refused(capsys, "is not empty; give a new directory", "tiny-draft", *plain, str(tmp_path / "full"))
    assert quantized(*plain, str(tmp_path / "once")) == 0
    capsys.readouterr()
    again = (str(tmp_path / "once"), *plain, str(tmp_path / "twice"))
    refused(capsys, "is quantized already (int8); give the dense model", *again)
    narrow = narrowed(tmp_path / "narrow")
    refused(
        capsys,
        "do not divide into groups of 128",
        narrow,
        "--scheme",
        "int4-g128",
        "--out",
        str(tmp_path / "n"),
    )


def narrowed(folder: Path) -> str:
    """A model whose down projections have 320 input features; only its config is looked at."""
    source = find_model("tiny-draft")
    folder.mkdir()
    config = {**source.hf_config, "intermediate_size": 320}
    (folder / "config.json").write_text(json.dumps(config))
    weights = Path(source.path) / "model.safetensors"  # type: ignore[attr-defined]
    (folder / "model.safetensors").symlink_to(weights.resolve())
    return str(folder)


def refused(capsys: pytest.CaptureFixture[str], message: str, *arguments: str) -> None:
    assert run_command(["quantize", *arguments]) == USAGE
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0] and len(lines[0]) < 300, lines
