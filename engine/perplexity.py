"""Teacher-forced log-probabilities and perplexity, by plain forward passes without scheduler or sampler."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbench.engine.models.decoder import Decoder, whole_sequences
from backbench.errors import EngineError

LOGIT_ROWS = 256
"""Rows of logits held at once: bounds memory where the vocabulary is large."""


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts given sequences (Jelinek et al. 1977)."""

    num_sequences: int
    num_tokens: int
    """Tokens predicted: all but each sequence's first."""
    mean_nll: float
    """Mean negative log-likelihood a token, in nats."""

    @property
    def value(self) -> float:
        """exp(mean_nll); lower is better."""
        return math.exp(self.mean_nll)


@dataclass(frozen=True)
class Corpus:
    """Text to measure perplexity on, and where it came from."""

    source: str
    sha256: str
    text: str


@torch.inference_mode()
def predictions(decoder: Decoder, ids: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """(logits f32[rows, vocabulary], the tokens i64[rows] they predict), over all tokens of `ids` after its
    first, in order; at most `LOGIT_ROWS` at once."""
    if len(ids) < 2:
        raise EngineError(f"A sequence of {len(ids)} tokens predicts nothing; give at least 2.")
    device = decoder.device.torch_device
    tokens = torch.tensor(ids, dtype=torch.int64, device=device)
    batch = whole_sequences([len(ids)], decoder.limits.block_size, device)
    caches = decoder.new_caches(batch.block_table.shape[1])
    hidden = decoder.forward(tokens, torch.arange(len(ids), device=device), batch, caches)
    for rows, following in zip(hidden[:-1].split(LOGIT_ROWS), tokens[1:].split(LOGIT_ROWS), strict=True):
        yield decoder.logits(rows).float(), following


@torch.inference_mode()
def teacher_forced(decoder: Decoder, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Log-probability f32[n - 1] of each token of `ids` after its first, and the top-1 tokens i64[n - 1]."""
    chosen, top = [], []
    for logits, following in predictions(decoder, ids):
        logprobs = logits.log_softmax(-1)
        chosen.append(logprobs.gather(1, following[:, None])[:, 0])
        top.append(logprobs.argmax(-1))
    return torch.cat(chosen), torch.cat(top)


def perplexity(decoder: Decoder, sequences: Sequence[Sequence[int]]) -> Perplexity:
    """Perplexity of token sequences, each predicted from its own first token on."""
    if not sequences:
        raise EngineError("Perplexity needs at least one sequence of two tokens or more.")
    total, count = 0.0, 0
    for ids in sequences:
        logprobs, _ = teacher_forced(decoder, ids)
        total -= float(logprobs.double().sum())
        count += len(logprobs)
    return Perplexity(len(sequences), count, total / count)


def topics_corpus() -> Corpus:
    """The language reference every CPython carries (`pydoc_data.topics`); its hash tells the version."""
    from pydoc_data.topics import topics

    return _corpus("pydoc_data.topics", "\n\n".join(topics[name] for name in sorted(topics)))


def file_corpus(path: Path) -> Corpus:
    """A user's text file in UTF-8."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EngineError(f"{path} cannot be read as UTF-8 text: {error}") from error
    return _corpus(str(path), text)


def split_corpus(corpus: Corpus, tokenizer: Any, *, length: int, limit: int | None = None) -> list[list[int]]:
    """The corpus as consecutive sequences of `length` tokens, at most `limit`; a shorter rest is left out."""
    ids = tokenizer(corpus.text, add_special_tokens=False, verbose=False)["input_ids"]
    sequences = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)][:limit]
    if not sequences:
        raise EngineError(f"{corpus.source} has {len(ids)} tokens, fewer than one sequence of {length}.")
    return sequences


def _corpus(source: str, text: str) -> Corpus:
    return Corpus(source, hashlib.sha256(text.encode()).hexdigest(), text)
