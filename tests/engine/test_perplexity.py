"""Perplexity against transformers' loss on the same sequences, and the corpora it is measured on."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from backbench.backends.interface.device import cpu
from backbench.backends.registry import select
from backbench.engine import perplexity as perplexity_module
from backbench.engine.limits import StepLimits
from backbench.engine.models.checkpoint import find_model
from backbench.engine.models.decoder import Decoder, attention_specs
from backbench.engine.perplexity import file_corpus, perplexity, split_corpus, teacher_forced, topics_corpus
from backbench.errors import EngineError


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A transformers model and the decoder of its checkpoint."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)
    source = find_model(str(folder))
    limits = StepLimits(block_size=8, max_len=64, max_seqs=1, max_step_tokens=63, prefill_chunk=63)
    specs = attention_specs(source.config, dtype=torch.float32, limits=limits)
    selection = select("torch", device=cpu(), specs=specs, dtype=torch.float32)
    weights = source.load_weights(torch.device("cpu"), torch.float32)
    return model, Decoder(source.config, weights, selection, dtype=torch.float32, limits=limits)


def test_perplexity_equals_transformers(models, monkeypatch):
    monkeypatch.setattr(perplexity_module, "LOGIT_ROWS", 7)
    model, decoder = models
    sequences = [torch.randint(60, (n,)).tolist() for n in (2, 33, 40)]
    found = perplexity(decoder, sequences)
    with torch.inference_mode():
        losses = [model(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item() for ids in sequences]
    total = sum(loss * (len(ids) - 1) for loss, ids in zip(losses, sequences, strict=True))
    assert (found.num_sequences, found.num_tokens) == (3, 72)
    assert found.mean_nll == pytest.approx(total / 72, rel=1e-5)
    assert found.value == pytest.approx(math.exp(total / 72), rel=1e-4)


def test_top_tokens(models):
    model, decoder = models
    ids = torch.randint(60, (20,)).tolist()
    logprobs, top = teacher_forced(decoder, ids)
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0, :-1]
    assert torch.equal(top, expected.argmax(-1))
    chosen = expected.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    torch.testing.assert_close(logprobs, chosen, atol=1e-4, rtol=1e-4)


def test_too_little_to_predict(models):
    with pytest.raises(EngineError, match="give at least 2"):
        perplexity(models[1], [[3]])
    with pytest.raises(EngineError, match="at least one sequence"):
        perplexity(models[1], [])


def test_corpora(tmp_path):
    topics = topics_corpus()
    assert topics.source == "pydoc_data.topics" and len(topics.text) > 100_000
    assert topics.sha256 == hashlib.sha256(topics.text.encode()).hexdigest()
    file = tmp_path / "text"
    file.write_text("abcdefg")
    letters = lambda text, **options: {"input_ids": list(text)}  # noqa: E731
    corpus = file_corpus(file)
    assert split_corpus(corpus, letters, length=3) == [["a", "b", "c"], ["d", "e", "f"]]
    assert split_corpus(corpus, letters, length=3, limit=1) == [["a", "b", "c"]]
    with pytest.raises(EngineError, match="has 7 tokens, fewer than one sequence of 8"):
        split_corpus(corpus, letters, length=8)


def test_unreadable_files_are_one_line(tmp_path):
    with pytest.raises(EngineError, match="cannot be read as UTF-8"):
        file_corpus(tmp_path / "nothing")
    (tmp_path / "latin").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(EngineError, match="cannot be read as UTF-8"):
        file_corpus(tmp_path / "latin")
