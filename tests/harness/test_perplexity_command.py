"""`bench perplexity` on each kind of text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from backbench.harness.cli import run_command


def measured(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    code = run_command(["perplexity", "--model", "tiny-draft", "--limit", "2", "--json", *arguments])
    out = capsys.readouterr().out
    assert code == 0
    return json.loads(out)


def test_topics_is_predicted_far_better_than_chance(capsys: pytest.CaptureFixture[str]) -> None:
    found = measured(capsys, "--length", "128")
    assert found["text"] == "pydoc_data.topics"
    assert found["num_tokens"] == 2 * 127
    assert found["perplexity"] < 4096 / 4


def test_sampled_sequences_are_fixed_and_match_the_models_own_entropy(
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = measured(capsys, "--text", "sampled", "--length", "64")
    again = measured(capsys, "--text", "sampled", "--length", "64", "--backend", "sdpa")
    assert first["text_sha256"] == again["text_sha256"]
    # The same weights in fp32 through another attention: rounding alone.
    assert again["mean_nll"] == pytest.approx(first["mean_nll"], rel=1e-4)


def test_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "text.txt"
    file.write_text("It was a bright cold day, and the clocks were striking. " * 20)
    found = measured(capsys, "--text", str(file), "--length", "32")
    assert found["num_sequences"] == 2
    assert found["text"] == "~/text.txt", "a home is nobody's business"


def test_a_missing_file_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run_command(["perplexity", "--model", "tiny-draft", "--text", str(tmp_path / "no.txt")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
