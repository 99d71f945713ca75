"""The whole engine gives transformers' greedy tokens on the bundled models."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from backbench.backends.interface.device import detect
from backbench.engine.config import EngineConfig
from backbench.engine.engine import Engine
from backbench.engine.models.checkpoint import find_model
from backbench.engine.request import SamplingParams

TEXTS = (
    "It was a bright morning, and the captain walked up and down the deck.",
    "The compiler checks",
    "Elizabeth could not but smile at such a letter; she read it twice, and then gave it to her sister.",
)


@pytest.mark.parametrize("backend", ["torch", "sdpa"])
@pytest.mark.parametrize("name", ["tiny", "tiny-draft"])
def test_64_greedy_tokens(name: str, backend: str) -> None:
    source = find_model(name)
    tokenizer = source.tokenizer()
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    config = EngineConfig(max_seqs=4, max_step_tokens=24, num_blocks=64)
    engine = Engine.open(source, backend=backend, device=detect(), dtype=torch.float32, config=config)
    done = engine.generate(prompts, SamplingParams(max_tokens=64, ignore_eos=True))
    reference = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
    for prompt, completion in zip(prompts, done, strict=True):
        ids = torch.tensor([prompt])
        expected = reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, min_new_tokens=64, do_sample=False
        )
        # min_new_tokens forbids the end token; where ours would pick it, the two ask different questions.
        tokens = expected[0, len(prompt) :].tolist()
        assert source.config.eos_token_ids[0] not in completion.token_ids
        assert completion.token_ids == tokens
