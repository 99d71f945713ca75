"""Token sequences that a model is forced through: of a text, or drawn from the model itself."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from backbench.backends.interface import Device
    from backbench.engine.models.checkpoint import ModelSource
    from backbench.engine.models.weights import Weights

SEED = 20240229
"""Of sequences that a model is judged on."""
SEQUENCES, LENGTH, CALIBRATION_SEED = 64, 256, 1
"""What is calibrated on where nothing else is asked for."""
PROMPT = 8
"""Random tokens that start each sequence drawn from a model."""


@dataclass(frozen=True)
class Sample:
    """Sequences of one length, and where they came from."""

    sequences: list[list[int]]
    source: str
    sha256: str
    """Of the text; of the token ids where a model drew them."""

    @property
    def tokens(self) -> int:
        """Tokens that are predicted: all but each sequence's first."""
        return sum(len(each) - 1 for each in self.sequences)


def sample_of(
    source: ModelSource,
    weights: Weights | None,
    device: Device,
    text: str,
    *,
    length: int,
    limit: int,
    seed: int = SEED,
) -> Sample:
    """At most `limit` sequences of `length` tokens of `text`: "topics", "sampled" or a UTF-8 file.

    weights: the model's, from which "sampled" draws with `seed`; None = they are loaded for it. Raises
    EngineError where there is no tokenizer, or the text is shorter than one sequence.
    """
    from backbench.engine.perplexity import file_corpus, split_corpus, topics_corpus

    if text == "sampled":
        sequences = sampled_sequences(source, device, weights, length, limit, seed)
        digest = hashlib.sha256(repr(sequences).encode()).hexdigest()
        return Sample(sequences, f"sampled from {source.name}, seed {seed}", digest)
    corpus = topics_corpus() if text == "topics" else file_corpus(Path(text))
    sequences = split_corpus(corpus, source.tokenizer(), length=length, limit=limit)
    return Sample(sequences, corpus.source, corpus.sha256)


def sampled_sequences(
    source: ModelSource, device: Device, weights: Weights | None, length: int, limit: int, seed: int = SEED
) -> list[list[int]]:
    """`limit` sequences of `length` tokens drawn at temperature 1 from the model under the torch backend.

    weights: the model's, where they are loaded already.
    """
    import numpy as np

    from backbench.engine.config import EngineConfig
    from backbench.engine.engine import Engine
    from backbench.engine.request import SamplingParams

    config = EngineConfig(max_seqs=limit, max_len=length, graphs=False, prefix_cache=False)
    dtype = None if weights is None or weights.embedding is None else weights.embedding.dtype
    drawn = Engine.open(source, backend="torch", device=device, dtype=dtype, config=config, weights=weights)
    count = min(PROMPT, length - 1)
    rng = np.random.Generator(np.random.PCG64(seed))
    prompts = rng.integers(0, source.config.vocab_size, (limit, count)).tolist()
    sequences = []
    for index, prompt in enumerate(prompts):
        params = SamplingParams(
            max_tokens=length - count, temperature=1.0, seed=seed + index, ignore_eos=True
        )
        drawn.add_request(str(index), prompt, params)
        sequences.append(prompt)
    while drawn.has_work:
        for token in drawn.step():
            sequences[int(token.request_id)].append(token.token_id)
    return sequences
