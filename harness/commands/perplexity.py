"""`bench perplexity`: how well a model predicts text, under any backend."""

from __future__ import annotations

from dataclasses import asdict

import click

from backbench.harness.commands.flags import subject_flag

TEXT_HELP = (
    "`topics` (pydoc_data.topics, English prose in every CPython), `sampled` (sequences drawn once from the "
    "unquantized model under the torch backend), or a UTF-8 file."
)
MOST_TOKENS = 2**20
MOST_SEQUENCES = 2**16


@click.command()
@subject_flag("model")
@subject_flag("backend", default="torch")
@subject_flag("dtype")
@subject_flag("device", parameter="prefer")
@click.option(
    "--text",
    default="topics",
    show_default=True,
    help=TEXT_HELP,
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
    from backbench.engine.calibration.samples import sample_of
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
    sample = sample_of(source, engine.weights, device, text, length=length, limit=limit)
    found = measure(engine.decoder, sample.sequences)
    result = {
        "model": source.describe(),
        "backend": engine.selection.used,
        "text": sample.source,
        "text_sha256": sample.sha256,
        **asdict(found),
        "perplexity": found.value,
    }
    if as_json:
        print_json(redacted(result))
        return
    rows = [
        ("Text", f"{sample.source} (sha256 {sample.sha256[:12]})"),
        ("Predicted", f"{found.num_tokens:,} tokens in {found.num_sequences} sequences"),
        ("Mean negative log-likelihood", f"{found.mean_nll:.4f} nats/token"),
        ("Perplexity", f"{found.value:.2f}"),
    ]
    print_table(f"{model} under {backend}", ("Field", "Value"), rows)
