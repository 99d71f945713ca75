"""The bundled checkpoints: small, complete, loadable without a network, and trained."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from backbench.engine.models.checkpoint import BUNDLED

MODELS = BUNDLED
NAMES = ("tiny", "tiny-draft")
FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
# Written for this test: it is in no training text.
PARAGRAPH = (
    "In the evening the old captain walked down to the harbour with his daughter, and they spoke of the "
    "long voyage that was before him. “You must write to me,” she said, “from every port.” He promised that "
    "he would, and for some time they stood together on the shore and looked out at the ships, which lay "
    "quite still upon the dark water. When at last he turned to go she took his hand, and he saw that there "
    "were tears in her eyes; but she did not say another word until they had come to the door of the house."
)


def test_both_fit_in_twelve_megabytes() -> None:
    assert {path.name for path in MODELS.iterdir() if path.is_dir()} >= set(NAMES)
    assert sum(path.stat().st_size for path in MODELS.rglob("*") if path.is_file()) <= 12_000_000


@pytest.mark.parametrize("name", NAMES)
def test_checkpoint_is_complete_and_bf16(name: str) -> None:
    assert {path.name for path in (MODELS / name).iterdir()} >= FILES
    with safe_open(MODELS / name / "model.safetensors", framework="pt") as file:
        dtypes = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118 - no mapping
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 - tied to the embeddings
    assert dtypes == {"BF16"}


def test_both_have_the_same_tokenizer() -> None:
    first, second = ((MODELS / name / "tokenizer.json").read_bytes() for name in NAMES)
    assert first == second


@pytest.mark.parametrize("name", NAMES)
def test_tokenizer_and_configuration_agree(name: str) -> None:
    config = json.loads((MODELS / name / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(MODELS / name)
    assert len(tokenizer) == config["vocab_size"] == 4096
    assert tokenizer.eos_token_id == config["eos_token_id"] == 0
    assert tokenizer.model_max_length == config["max_position_embeddings"] == 4096
    assert tokenizer.decode(tokenizer(PARAGRAPH).input_ids) == PARAGRAPH


def test_cards_say_what_a_reader_needs() -> None:
    tiny, draft = ((MODELS / name / "README.md").read_text(encoding="utf-8") for name in NAMES)
    assert float(re.findall(r"\*\*([\d.]+) nats per token\*\*", tiny)[0]) < 4
    for needed in ("public domain", "MIT OR Apache-2.0", "steps of", "bits per byte", "tools/train_tiny.py"):
        assert needed in tiny
    # Before it was distilled, lossless acceptance kept 61 % of its tokens.
    assert float(re.findall(r"\*\*([\d.]+)%\*\*", draft)[0]) > 70
    for needed in ("steps of", "samples of", "tools/distill_draft.py", "Apache-2.0"):
        assert needed in draft


# An untrained model gives log(4096) = 8.3 nats a token; on the held-out documents token frequencies give
# 6.6 and a trigram model 4.1. The training texts are hard-wrapped, so the paragraph is as well. The draft has
# learned what `tiny` says, not English: it has to be better than the trigrams.
MOST_NATS = {"tiny": 3.6, "tiny-draft": 4.1}


@pytest.mark.parametrize("name", NAMES)
def test_unseen_english_is_predicted(name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32)
    wrapped = textwrap.fill(PARAGRAPH, 70)
    tokens = AutoTokenizer.from_pretrained(MODELS / name)(wrapped, return_tensors="pt").input_ids
    with torch.no_grad():
        loss = model(input_ids=tokens, labels=tokens).loss.item()
    assert 2 < loss < MOST_NATS[name]


def test_loads_without_a_network() -> None:
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise AssertionError('a socket was opened')\n"
        "socket.socket.connect = refuse\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "tokens = AutoTokenizer.from_pretrained(sys.argv[1])('The sea', return_tensors='pt').input_ids\n"
        "print(model.generate(tokens, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape[1])\n"
    )
    command = [sys.executable, "-c", code, str(MODELS / "tiny-draft")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 4
