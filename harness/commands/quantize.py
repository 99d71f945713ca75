"""`bench quantize`: a quantized or sparse checkpoint of a dense one, that other engines load as well."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from backbench.engine.calibration.samples import CALIBRATION_SEED, LENGTH, SEQUENCES
from backbench.engine.config import SCHEMES
from backbench.harness.commands.flags import subject_flag
from backbench.harness.commands.perplexity import MOST_SEQUENCES, MOST_TOKENS

if TYPE_CHECKING:
    from backbench.backends.interface import Scheme
    from backbench.engine.calibration.samples import Sample


@click.command()
@click.argument("model")
@click.option("--scheme", metavar="SCHEME", help=f"How weights are kept: {', '.join(SCHEMES)}. [as they are]")
@click.option(
    "--method",
    default="rtn",
    show_default=True,
    metavar="rtn|gptq|awq",
    help="How they are rounded: to nearest, by GPTQ or by AWQ.",
)
@subject_flag("sparsity", help="Zeros among the weights: two of each four, or a share of every row.")
@click.option(
    "--sparsity-method",
    "--prune",
    "sparsity_method",
    default="magnitude",
    show_default=True,
    metavar="magnitude|wanda",
    help="Which weights become 0: the smallest, or the smallest times the norm of their inputs (Wanda).",
)
@subject_flag("quantize_head", help="The output head, too; a tied one gets a copy of its own.")
@click.option(
    "--calibrate",
    metavar="self|topics|FILE",
    help="Text that GPTQ, AWQ and Wanda measure inputs on: `self` (sequences drawn from the model "
    "itself), `topics` (English prose in every CPython) or a UTF-8 file. [self]",
)
@click.option(
    "--sequences",
    default=SEQUENCES,
    show_default=True,
    type=click.IntRange(1, MOST_SEQUENCES),
    help="Sequences to calibrate on, at most.",
)
@click.option(
    "--length",
    default=LENGTH,
    show_default=True,
    type=click.IntRange(2, MOST_TOKENS),
    help="Tokens a sequence.",
)
@click.option(
    "--seed", default=CALIBRATION_SEED, show_default=True, type=click.IntRange(0), help="Of drawn sequences."
)
@subject_flag("device", parameter="prefer")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), metavar="DIR", help="A new or empty directory."
)
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
def quantize(
    model: str,
    scheme: str | None,
    method: str,
    sparsity: str | None,
    sparsity_method: str,
    quantize_head: bool | None,
    calibrate: str | None,
    sequences: int,
    length: int,
    seed: int,
    prefer: str | None,
    out: Path,
    as_json: bool,
) -> None:
    """Write MODEL with quantized or sparse weights as a compressed-tensors checkpoint."""
    from backbench.backends.interface.device import detect
    from backbench.engine.calibration.recipe import Recipe
    from backbench.engine.calibration.samples import sample_of
    from backbench.engine.calibration.writing import check, require_new, write_quantized
    from backbench.engine.models.checkpoint import DirectorySource, find_model
    from backbench.errors import EngineError
    from backbench.harness.commands.output import echo, print_json
    from backbench.harness.provenance import redacted

    scheme = None if scheme == "none" else scheme
    recipe = Recipe(_scheme(scheme, sparsity), method, sparsity_method, bool(quantize_head))
    if calibrate is not None and not recipe.calibrated:
        raise EngineError(
            "--calibrate has nothing to serve; give --method gptq or awq, or --sparsity-method wanda."
        )
    source = find_model(model)
    if not isinstance(source, DirectorySource):
        raise EngineError(f"{model} has random weights and no files; give a model that has a checkpoint.")
    require_new(out)
    check(source, recipe)
    device = detect(prefer=prefer)
    sample = None
    if recipe.calibrated:
        length = min(length, source.config.max_len)
        text = "sampled" if calibrate in (None, "self") else calibrate
        sample = sample_of(source, None, device, text, length=length, limit=sequences, seed=seed)
    made = {
        "model": source.name,
        "revision": source.revision,
        "scheme": scheme,
        "method": method if scheme else None,
        "sparsity": sparsity,
        "sparsity_method": sparsity_method if sparsity else None,
        "head": recipe.head,
        "calibration": sample and _described(sample, length),
    }
    num_bytes = write_quantized(
        source,
        out,
        recipe,
        device,
        sequences=sample.sequences if sample else (),
        made=redacted(made),
        progress=lambda line: echo(line, err=True),
    )
    kept = DirectorySource(str(out), out).config.quantization
    written = redacted({**made, "quantization": kept, "num_bytes": num_bytes, "directory": str(out)})
    if as_json:
        print_json(written)
    else:
        _print(written)


def _print(written: dict[str, Any]) -> None:
    from backbench.harness.commands.output import print_table

    kept, sparsity = written["quantization"] or "dense", written["sparsity"]
    rows = [
        ("Model", written["model"]),
        ("Weights", f"{kept}, {sparsity} by {written['sparsity_method']}" if sparsity else kept),
        ("Rounded", written["method"] or "not at all"),
        ("Calibrated on", written["calibration"]["source"] if written["calibration"] else "nothing"),
        ("Bytes", f"{written['num_bytes']:,}"),
    ]
    print_table(f"Written to {written['directory']}", ("Field", "Value"), rows)


def _scheme(name: str | None, sparsity: str | None) -> Scheme:
    from backbench.backends.interface import Scheme
    from backbench.backends.quantization import named

    return replace(Scheme() if name is None else named(name), sparsity=sparsity)


def _described(sample: Sample, length: int) -> dict[str, Any]:
    """What was calibrated on, as quantize.json says it."""
    return {
        "source": sample.source,
        "sha256": sample.sha256,
        "sequences": len(sample.sequences),
        "length": length,
    }
