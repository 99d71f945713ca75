"""`bench perplexity`: how well a model predicts text, under any backend."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from backbench.harness.commands.flags import subject_flag

if TYPE_CHECKING:
    from backbench.engine.engine import Engine
    from backbench.engine.models.checkpoint import ModelSource

MOST_TOKENS = 2**20
MOST_SEQUENCES = 2**16
SAMPLE_SEED = 20240229
SAMPLE_PROMPT = 8
"""Random tokens that start each sampled sequence."""


@click.command()
@subject_flag("model")
@subject_flag("backend", default="torch")
@subject_flag("dtype")
@subject_flag("device", parameter="prefer")
@click.option(
    "--text",
    default="topics",
    show_default=True,
    help="`topics` (pydoc_data.topics, English prose in every CPython), `sampled` (sequences drawn once "
    "from the model under the torch backend), or a UTF-8 file.",
)
@click.option(
    "--length", default=512, show_default=True, type=click.IntRange(2, MOST_TOKENS), help="Tokens a sequence."
)
@click.option(
    "--limit",
    default=32,
    show_default=True,
    type=click.IntRange(1, MOST_SEQUENCES),
    help="Sequences at most.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON.")
def perplexity(
    model: str,
    backend: str,
    dtype: str | None,
    prefer: str | None,
    text: str,
    length: int,
    limit: int,
    as_json: bool,
) -> None:
    """Measure the perplexity of a model on text that does not ship with this product."""
    from backbench.backends.interface.device import detect
    from backbench.engine.config import EngineConfig
    from backbench.engine.engine import Engine
    from backbench.engine.models.checkpoint import find_model
    from backbench.engine.models.config import DTYPES
    from backbench.engine.perplexity import perplexity as measure
    from backbench.harness.commands.output import print_json, print_table
    from backbench.harness.provenance import redacted

    source = find_model(model)
    device = detect(prefer=prefer)
    length = min(length, source.config.max_len)
    config = EngineConfig(max_seqs=limit, max_len=length, max_step_tokens=max(length, 512))
    engine = Engine.open(
        source, backend=backend, device=device, dtype=DTYPES[dtype] if dtype else None, config=config
    )
    sequences, origin, digest = _sequences(engine, source, text, length, limit)
    found = measure(engine.decoder, sequences)
    result = {
        "model": source.describe(),
        "backend": engine.selection.used,
        "text": origin,
        "text_sha256": digest,
        **asdict(found),
        "perplexity": found.value,
    }
    if as_json:
        print_json(redacted(result))
        return
    rows = [
        ("Text", f"{origin} (sha256 {digest[:12]})"),
        ("Predicted", f"{found.num_tokens:,} tokens in {found.num_sequences} sequences"),
        ("Mean negative log-likelihood", f"{found.mean_nll:.4f} nats/token"),
        ("Perplexity", f"{found.value:.2f}"),
    ]
    print_table(f"{model} under {backend}", ("Field", "Value"), rows)


def _sequences(
    engine: Engine, source: ModelSource, text: str, length: int, limit: int
) -> tuple[list[list[int]], str, str]:
    """Token sequences, where they come from, and their hash."""
    from backbench.engine.perplexity import file_corpus, split_corpus, topics_corpus

    if text == "sampled":
        sequences = sampled_sequences(source, engine.selection.device, engine.weights, length, limit)
        digest = hashlib.sha256(repr(sequences).encode()).hexdigest()
        return sequences, f"sampled from {source.describe()['name']}, seed {SAMPLE_SEED}", digest
    corpus = topics_corpus() if text == "topics" else file_corpus(Path(text))
    sequences = split_corpus(corpus, source.tokenizer(), length=length, limit=limit)
    return sequences, corpus.source, corpus.sha256


def sampled_sequences(
    source: ModelSource, device: Any, weights: Any, length: int, limit: int, seed: int = SAMPLE_SEED
) -> list[list[int]]:
    """`limit` sequences of `length` tokens drawn at temperature 1 from the model under the torch backend."""
    import numpy as np

    from backbench.engine.config import EngineConfig
    from backbench.engine.engine import Engine
    from backbench.engine.request import SamplingParams

    config = EngineConfig(max_seqs=limit, max_len=length, graphs=False, prefix_cache=False)
    reference = Engine.open(source, backend="torch", device=device, config=config, weights=weights)
    count = min(SAMPLE_PROMPT, length - 1)
    rng = np.random.Generator(np.random.PCG64(seed))
    prompts = rng.integers(0, source.config.vocab_size, (limit, count)).tolist()
    sequences = []
    for index, prompt in enumerate(prompts):
        params = SamplingParams(
            max_tokens=length - count, temperature=1.0, seed=seed + index, ignore_eos=True
        )
        reference.add_request(str(index), prompt, params)
        sequences.append(prompt)
    while reference.has_work:
        for token in reference.step():
            sequences[int(token.request_id)].append(token.token_id)
    return sequences
