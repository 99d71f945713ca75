"""`bench accuracy`: what quantization costs in answers, scheme by scheme."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from backbench.engine.config import EngineConfig
from backbench.harness.commands.flags import subject_flag
from backbench.harness.commands.perplexity import MOST_TOKENS, TEXT_HELP
from backbench.options import options_of

if TYPE_CHECKING:
    from backbench.engine.engine import Engine
    from backbench.harness.accuracy import Unquantized

TOKENS = 4096
OWN = [each.name for each in options_of(EngineConfig) if each.group == "subject"]
"""The engine's settings that change what a model answers, beside `--quantize`."""


def _with_own(function: Any) -> Any:
    for name in reversed(OWN):
        function = subject_flag(name)(function)
    return function


@click.command()
@subject_flag("model")
@subject_flag("quantize", help="Schemes of a dense model's weights, separated by commas.")
@_with_own
@subject_flag("against")
@subject_flag("backend", default="torch", help="See `bench backends`; or auto.")
@subject_flag("dtype")
@subject_flag("device", parameter="prefer")
@click.option(
    "--text", default=None, metavar="TEXT|FILE", help=f"{TEXT_HELP} [topics; without a tokenizer: sampled]"
)
@click.option(
    "--tokens", default=TOKENS, show_default=True, type=click.IntRange(2, MOST_TOKENS), help="Of the text."
)
@click.option(
    "--length", default=128, show_default=True, type=click.IntRange(2, MOST_TOKENS), help="Tokens a sequence."
)
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON.")
def accuracy(
    model: str,
    quantize: str | None,
    against: str | None,
    backend: str,
    dtype: str | None,
    prefer: str | None,
    text: str | None,
    tokens: int,
    length: int,
    as_json: bool,
    **own: Any,
) -> None:
    """Compare a model under quantized weights with the same model unquantized, on the same text.

    Both are forced through the same tokens: perplexity of either, KL(unquantized || quantized) over the whole
    vocabulary, and how often both have the same top token, with 95 % intervals between sequences. The models
    are loaded one after the other; what the unquantized one predicts is kept in a file in TMPDIR, 4 bytes a
    token and word of the vocabulary.
    """
    import torch

    from backbench.backends.interface.device import detect
    from backbench.engine.models.checkpoint import find_model
    from backbench.engine.models.config import DTYPES
    from backbench.errors import HarnessError
    from backbench.harness import accuracy as measure
    from backbench.harness.commands.output import print_json
    from backbench.harness.provenance import redacted

    source, device = find_model(model), detect(prefer=prefer)
    own = {name: value for name, value in own.items() if value is not None}
    schemes = [] if quantize is None else quantize.split(",")
    stored = source.config.quantization
    if stored is not None and against is None:
        raise HarnessError(
            f"{model} is quantized already ({stored}); name the unquantized model with --against."
        )
    original = source if against is None else find_model(against)
    measure.require_alike(source, original)
    wanted = [own | {"quantize": scheme} for scheme in schemes] or [own]
    if stored is None and against is None:
        plain = (None, False, "none")
        wanted = [each for each in wanted if any(value not in plain for value in each.values())]
    if not wanted:
        raise HarnessError(f"Nothing changes what {model} answers; give --quantize, or another of its kind.")
    kind = (
        DTYPES[dtype]
        if dtype
        else torch.float32
        if device.torch_device.type == "cpu"
        else source.config.dtype
    )
    length = min(length, tokens, source.config.max_len)
    setting = measure.Setting(backend, device, kind, {}, length)
    if (why := measure.too_large(original, setting)) is not None:
        raise HarnessError(f"{why}.")
    rows = []
    with measure.predicted(original, setting, text, tokens) as unquantized:
        for each in wanted:
            engine = setting.open(source, **each)
            rows.append(_row(engine, unquantized))
            del engine
            measure.free(device)
    about = {
        "model": source.describe(),
        "against": original.name,
        "backend": backend,
        "dtype": str(kind).removeprefix("torch."),
        "corpus": unquantized.sample.source,
        "corpus_sha256": unquantized.sample.sha256,
        "num_sequences": len(unquantized.sample.sequences),
        "tokens": unquantized.sample.tokens,
        "weights_bytes_unquantized": unquantized.weights_bytes,
    }
    found = redacted(about | {"schemes": rows})
    if as_json:
        print_json(found)
    else:
        _print(found)


def _row(engine: Engine, unquantized: Unquantized) -> dict[str, Any]:
    """One scheme's numbers."""
    from backbench.harness.accuracy import section

    kept = [engine.model_config.quantization]
    if engine.decoder.kv_dtype != engine.decoder.dtype:
        kept.append(f"KV in {engine.config.kv_dtype}")
    found = section(unquantized, engine.decoder)
    same = ("corpus", "corpus_sha256", "against", "tokens")
    return {
        "scheme": ", ".join(each for each in kept if each) or "dense",
        "weights_bytes": engine.weights.num_bytes,
        **{name: each for name, each in found.items() if name not in same},
    }


def _print(found: dict[str, Any]) -> None:
    from backbench.harness.commands.output import echo, print_table
    from backbench.reports.metrics.accuracy import METRICS
    from backbench.reports.quantities import DASH, Reading, format_reading, format_value

    def text(row: dict[str, Any], key: str) -> str:
        each = row[key]
        return format_reading(Reading(each["value"], each["low"], each["high"]), units[key])

    units = {metric.path[-1]: metric.unit for metric in METRICS}
    labels = {metric.path[-1]: metric.label for metric in METRICS}
    shown = ("perplexity", "perplexity_change", "kl_divergence", "top1_unchanged")
    first = found["schemes"][0]
    bytes_ = format_value(found["weights_bytes_unquantized"], "bytes")
    rows = [[found["dtype"], bytes_, text(first, "perplexity_unquantized"), DASH, DASH, DASH]]
    for row in found["schemes"]:
        weights = format_value(row["weights_bytes"], "bytes")
        rows.append([row["scheme"], weights, *(text(row, key) for key in shown)])
    columns = ("Weights kept as", "Weights", *(labels[key] for key in shown))
    print_table(f"{found['model']['name']} beside {found['against']}", columns, rows, right=range(1, 6))
    echo(
        f"{found['tokens']:,} tokens in {found['num_sequences']} sequences of {found['corpus']} "
        f"(sha256 {found['corpus_sha256'][:12]}), {found['backend']}; 95 % intervals between sequences."
    )
