"""The script that distils the draft model, on a few short samples of `tiny`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from backbench.engine.models.checkpoint import BUNDLED

# `tools` is no package: its scripts import one another as neighbours, and so does this test.
sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import distill_draft as script


def test_two_steps_write_a_checkpoint_and_its_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "SAMPLED_START", 4)
    short = "--samples 5 --sample-tokens 16 --steps 2 --batch 2 --width 64 --device cpu"
    monkeypatch.setattr(sys, "argv", ["distill_draft.py", "--out", str(tmp_path), *short.split()])
    script.main()
    assert "accepts" in capsys.readouterr().out
    student = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (student.config.num_hidden_layers, student.config.hidden_size) == (1, 64)
    card = (tmp_path / "README.md").read_text()
    assert "2 steps of 2 samples" in card and "5 samples of 16 tokens" in card
    assert (tmp_path / "tokenizer.json").read_bytes() == (BUNDLED / "tiny" / "tokenizer.json").read_bytes()


def test_the_loss_is_zero_for_the_teacher_alone() -> None:
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 3, 50), torch.randn(2, 3, 50)
    assert script.divergence(teacher, teacher).item() == pytest.approx(0, abs=1e-6)
    assert script.divergence(student, teacher).item() > 0.1


def test_samples_are_the_teachers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The greedy row goes on with the most likely token; the others with likely ones."""
    teacher = AutoModelForCausalLM.from_pretrained(BUNDLED / "tiny", dtype=torch.float32).eval()
    torch.manual_seed(0)
    monkeypatch.setattr(script, "SAMPLED_START", 4)
    ids = script.sample(teacher, 5, 12)
    with torch.no_grad():
        likely = teacher(input_ids=ids).logits.argmax(-1)
    assert torch.equal(ids[4, 4:], likely[4, 3:-1])
    assert not torch.equal(ids[0, 4:], likely[0, 3:-1])
    same = script.agreement(teacher, teacher, ids)
    assert all(value == pytest.approx((1, 1), abs=1e-5) for value in same.values())


def test_the_published_card_was_written_by_it() -> None:
    card = (BUNDLED / "tiny-draft" / "README.md").read_text(encoding="utf-8")
    asked = dict(re.findall(r"--([a-z-]+) ([\d.]+)", card))
    fields = script.Recipe.__dataclass_fields__
    assert {name.replace("-", "_") for name in asked} <= set(fields)
