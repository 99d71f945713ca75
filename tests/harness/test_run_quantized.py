"""`bench run --quantize` end to end on the bundled model, on a CPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from backbench.harness.cli import run_command
from backbench.reports.quantities import format_value
from backbench.reports.record import RunDirectory
from backbench.reports.verify import verify

SHORT = ("run", "-w", "batch:2x8+4", "-b", "torch", "--warmup", "1", "--max-len", "64")
ROLES = {"qkv", "attention_output", "gate_up", "down", "head"}
NOT_MEASURED = dict.fromkeys(("faster_than_dense_up_to_rows", "slower_than_dense_from_rows", "served_beyond"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Three schemes of one model, a run each; and what was printed."""
    out = tmp_path_factory.mktemp("quantized") / "x"
    command = [sys.executable, "-m", "backbench", *SHORT, "--quantize", "none,int8,int8-w8a8"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command += ["--quantize-head", "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_every_scheme_is_an_arm_of_one_experiment(made: tuple[Path, str]) -> None:
    out, said = made
    assert {each.name for each in out.iterdir()} == {
        *("1-none", "2-int8", "3-int8-w8a8"),
        *("experiment.json", "report.html"),
    }
    assert "Quantized weights" in said and "int8-w8a8, head too" in said
    assert 'id="quantized"' in (out / "report.html").read_text()
    assert run_command(["compare", str(out)]) == 0


def test_the_record_says_what_served_each_role_and_its_bytes(made: tuple[Path, str]) -> None:
    directory = RunDirectory.open(made[0] / "2-int8")
    record = directory.read_record()
    assert verify(directory) == []
    assert record.model["quantization"] == "int8, head too"
    assert record.run["asked"]["quantize"] == "int8" and record.engine["quantize"] == "int8"
    linears = record.backend["linears"]
    assert linears.keys() == ROLES
    assert {row["scheme"] for row in linears.values()} == {"int8"}
    assert {row["served_by"] for row in linears.values()} == {"torch, int8 weights"}
    gate_up = 5 * (1280 * 256 + 1280 * 4)  # codes, and an fp32 scale a row
    assert linears["gate_up"] == {
        "scheme": "int8",
        "served_by": "torch, int8 weights",
        **NOT_MEASURED,
        "held_bytes": gate_up,
        "read_bytes": gate_up,
    }
    embedding = 4096 * 256 * 4
    held = record.memory["weights_bytes"]
    assert record.memory["weights_read_bytes"] == held - embedding
    assert record.metrics["context"]["shape"]["weight_bytes_per_step"] == held - embedding
    assert record.correctness["passed"] is True and record.correctness["noise_dtype"] == "float64"


def test_accuracy_stands_beside_speed(made: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    """Both models predict the text that `bench perplexity` reads, the unquantized one as it does there."""
    out, said = made
    for column in ("Weights", "Output tok/s, whole run", "Perplexity change", "KL divergence"):
        assert column in said
    assert "KL divergence" in (out / "report.html").read_text()
    losses = []
    for name in ("2-int8", "3-int8-w8a8"):
        record = RunDirectory.open(out / name).read_record()
        found = record.accuracy
        assert abs(found["perplexity_change"]["value"]) < 0.01
        assert found["perplexity_change"]["low"] < found["perplexity_change"]["high"]
        assert (found["against"], found["corpus"], found["tokens"]) == ("tiny", "pydoc_data.topics", 32 * 63)
        losses.append(found["kl_divergence"]["value"])
    assert 0 < losses[0] < losses[1] < 0.01
    assert run_command(["perplexity", "--length", "64", "--limit", "32", "--json"]) == 0
    dense = json.loads(capsys.readouterr().out)
    assert dense["text_sha256"] == found["corpus_sha256"] and dense["num_tokens"] == found["tokens"]
    # The same products and sums; log-probabilities in fp32 there, in fp64 here.
    assert found["perplexity_unquantized"]["value"] == pytest.approx(dense["perplexity"], rel=1e-6)
    assert RunDirectory.open(out / "1-none").read_record().accuracy == {"reason": "nothing is quantized"}


@pytest.mark.browser
def test_the_page_shows_accuracy_in_a_browser(made: tuple[Path, str], browser: Any) -> None:
    page = browser.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.goto((made[0] / "report.html").as_uri())
    section = page.locator("#accuracy-section")
    assert section.is_visible()
    text = section.inner_text()
    for name in ("2-int8", "3-int8-w8a8"):
        found = RunDirectory.open(made[0] / name).read_record().accuracy
        assert format_value(found["kl_divergence"]["value"], "nat") in text
    assert not said
    page.close()


def test_verify_holds_accuracy_to_what_is_kept(made: tuple[Path, str], tmp_path: Path) -> None:
    path = shutil.copytree(made[0] / "2-int8", tmp_path / "run") / "run.json"
    data = json.loads(path.read_text())
    data["accuracy"]["kl_divergence"]["value"] /= 2
    path.write_text(json.dumps(data))
    assert any(
        each.startswith("accuracy.kl_divergence.value is ") for each in verify(RunDirectory(path.parent))
    )


def test_a_dense_run_has_no_quantization(made: tuple[Path, str]) -> None:
    record = RunDirectory.open(made[0] / "1-none").read_record()
    assert record.model["quantization"] is None
    assert record.memory["weights_bytes"] == record.memory["weights_read_bytes"] == 17_970_688
    assert {row["served_by"] for row in record.backend["linears"].values()} == {"torch"}


def test_two_of_four_are_kept_and_the_record_says_so(tmp_path: Path) -> None:
    """17/32 of the dense bytes in fp32, of every product but the head; and the results are right."""
    out = tmp_path / "sparse"
    assert run_command([*SHORT, "--sparsity", "2:4", "--accuracy", "none", "-o", str(out)]) == 0
    record = RunDirectory.open(out).read_record()
    assert record.model["quantization"] == "2:4"
    linears = record.backend["linears"]
    kept = 5 * 1280 * 256 * 4 * 17 // 32
    assert linears["gate_up"] == {
        "scheme": "2:4",
        "served_by": "torch, expanded",
        **NOT_MEASURED,
        "held_bytes": kept,
        "read_bytes": kept,
    }
    assert linears["head"]["scheme"] == "none" and linears["head"]["served_by"] == "torch"
    dense = 17_970_688
    products = sum(row["held_bytes"] for role, row in linears.items() if role != "head")
    assert record.memory["weights_bytes"] == dense - products * 32 // 17 + products
    assert record.correctness["passed"] is True


def test_rounded_rows_have_no_flop_peak(made: tuple[Path, str]) -> None:
    record = RunDirectory.open(made[0] / "3-int8-w8a8").read_record()
    assert record.roofline["mfu"]["measured"] is None
    assert record.roofline["absent"]["mfu.measured"] == "the peak of int8-token products is not measured"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--quantize", "int5"), "--quantize takes none, int8, "),
        (("--quantize-head",), "--quantize-head needs --quantize or --sparsity"),
        (("--sparsity", "4:2"), "--sparsity takes 2:4 or unstructured:SHARE"),
        (("--sparsity-method", "wanda"), "--sparsity-method says which weights become 0; give --sparsity"),
    ],
)
def test_what_cannot_be_is_one_line(options: tuple[str, ...], message: str, tmp_path: Path) -> None:
    arguments = [*SHORT, *options, "-o", str(tmp_path / "x")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "backbench", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.strip().splitlines()[-1:]
    assert message in line and len(line) <= 300


def test_a_layer_that_does_not_divide_is_named(tmp_path: Path) -> None:
    config = json.loads((Path("engine/checkpoints/tiny") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 650}))
    command = [sys.executable, "-m", "backbench", *SHORT, "-m", str(tmp_path), "--quantize", "int4-g128"]
    done = subprocess.run([*command, "-o", str(tmp_path / "x")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "model.layers.0.mlp.down_proj cannot be int4-g128: 650 input features" in done.stderr


def test_an_int8_cache_is_counted_with_its_scales(tmp_path: Path) -> None:
    assert run_command([*SHORT, "--kv-dtype", "int8", "-o", str(tmp_path / "x")]) == 0
    directory = RunDirectory.open(tmp_path / "x")
    record = directory.read_record()
    assert verify(directory) == []
    assert record.correctness["passed"] is True
    token = 5 * 2 * 2 * (64 + 4)
    assert record.metrics["context"]["shape"]["kv_bytes_per_token"] == token
    assert record.memory["kv_pool_bytes"] == record.engine["num_blocks"] * record.engine["block_size"] * token
    assert 0 < record.accuracy["kl_divergence"]["value"] < 0.01


def test_sdpa_refuses_an_int8_cache_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["run", "-w", "batch:2x8+4", "-b", "sdpa", "--kv-dtype", "int8", "-o", str(tmp_path / "x")]
    assert run_command(command) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        line.startswith("error: ") and "the KV cache must have the model's dtype" in line and len(line) < 300
    )
