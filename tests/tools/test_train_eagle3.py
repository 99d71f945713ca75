"""The script that trains an EAGLE-3 head: its passes are those of the engine's head, and it writes one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from eagle3_fixtures import PlainHead
from transformers import AutoModelForCausalLM

from backbench.backends.interface.device import cpu
from backbench.engine.config import EngineConfig
from backbench.engine.engine import Engine
from backbench.engine.models.checkpoint import BUNDLED, find_model
from backbench.engine.request import SamplingParams

# `tools` is no package: its scripts import one another as neighbours, and so does this test.
sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import train_eagle3 as script


def test_two_steps_write_a_head_that_the_engine_drafts_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (script, sys.modules["distill_draft"]):
        monkeypatch.setattr(module, "SAMPLED_START", 4)
    short = "--samples 5 --sample-tokens 16 --steps 2 --batch 2 --draft-vocab 100 --device cpu"
    monkeypatch.setattr(sys, "argv", ["train_eagle3.py", "--out", str(tmp_path), *short.split()])
    script.main()
    assert "can be drafted" in capsys.readouterr().out
    assert "2 steps of 2" in (tmp_path / "README.md").read_text()
    config = EngineConfig(
        speculate=f"eagle3:{tmp_path}:3", adaptive_drafts=False, max_len=64, num_blocks=16, max_seqs=2
    )
    engine = Engine.open(find_model("tiny"), backend="torch", device=cpu(), config=config)
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    plain = Engine.open(
        find_model("tiny"),
        backend="torch",
        device=cpu(),
        config=EngineConfig(max_len=64, num_blocks=16, max_seqs=2),
    )
    prompt = [[5, 6, 7, 8]]
    assert engine.generate(prompt, params)[0].token_ids == plain.generate(prompt, params)[0].token_ids
    assert sum(sum(step.draft_lengths) for step in engine.take_step_stats()) > 0


def test_training_passes_are_those_of_drafting(tmp_path: Path) -> None:
    """From every token, each pass over the states of the one before: as plain torch has it, one by one."""
    torch.manual_seed(0)
    target = AutoModelForCausalLM.from_pretrained(BUNDLED / "tiny", dtype=torch.float32).eval()
    head = script.Head(target, torch.arange(5, 300, 3))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    script.write(tmp_path, head, target, torch.float32)
    ids = torch.randint(5, 4000, (1, 12))
    states, embedded, _ = script.prepared(target, ids)
    with torch.no_grad():
        passes = list(head.passes(states, embedded, 3))
    embedding = target.get_input_embeddings().weight.detach()
    plain = PlainHead(tmp_path, embedding)
    for begin in range(1, 9):
        tokens = ids[0, : begin + 1].tolist()
        drafted = ids[0, begin + 1 : begin + 4].tolist()
        expected = plain.draft_logits(states[0, :begin], tokens, drafted)[:, head.draft_ids]
        for place in range(3):
            torch.testing.assert_close(passes[place][0, begin - 1], expected[place], rtol=1e-4, atol=1e-4)
    # fp32 sums of up to 768 products, in another order
