"""`bench tune`: measure the launches of a model's shapes on this GPU, once and offline."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from backbench.harness.commands.flags import subject_flag

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from backbench.backends.interface import AttentionSpec, Device, Problem, Tuner
    from backbench.backends.tuning.search import Finding
    from backbench.engine.models.config import ModelConfig

OPERATIONS = ("gemm", "attention")
MOST_COMPILERS = 14
COLUMNS = ("Operation", "Shape", "Dtype", "Before", "Best", "Gain", "Tried", "Launch")


@click.command()
@subject_flag("backend", parameter="backend_name", default="triton")
@subject_flag("model", required=True, help="Whose shapes are tuned.")
@subject_flag("dtype", default="bfloat16")
@subject_flag("quantize", default="none", help="Schemes of the products that are tuned, separated by commas.")
@subject_flag("sparsity", help="Zeros among the weights of these products; 2:4 has kernels of its own.")
@subject_flag("kv_dtype", help="Of the KV cache that attention is tuned on.")
@subject_flag("device", parameter="prefer")
@subject_flag("tp", help="Tune the shapes that one of N devices has.")
@click.option(
    "--block-size",
    "block_sizes",
    type=click.IntRange(1, 4096),
    multiple=True,
    help="Tokens a KV block holds; may be repeated [the engine's default].",
)
@click.option("--operations", default=",".join(OPERATIONS), show_default=True, help="What is tuned.")
@click.option(
    "--out",
    "-o",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="The table to write or add to [the one the backend reads].",
)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def tune(
    backend_name: str,
    model: str,
    dtype: str,
    quantize: str,
    sparsity: str | None,
    kv_dtype: str | None,
    prefer: str | None,
    tp: int,
    block_sizes: tuple[int, ...],
    operations: str,
    out: Path | None,
    as_json: bool,
) -> None:
    """Measure which launches are fastest for a model on this GPU, and keep them in the tuning table.

    Every launch is checked against fp32 first, and timed in a graph with cold caches. Run it on an idle GPU:
    nothing is ever tuned while serving. What the table already holds for other shapes stays.
    """
    from dataclasses import asdict

    from backbench.errors import HarnessError
    from backbench.harness.commands.output import print_json, print_table

    chosen = _operations(operations)
    tuner = _tuner(backend_name)
    if dtype == "float32":
        raise HarnessError("bench tune measures bf16 and fp16; float32 runs on written launches.")
    device = _gpu(prefer)
    asked = (dtype, quantize, sparsity, kv_dtype, block_sizes)
    problems = list(_problems(tuner, model, *asked, chosen, device, tp))
    file = out or tuner.file(device)
    findings = []
    for finding in measured(problems, file, device):
        findings.append(finding)
        click.echo(f"{len(findings)} of {len(problems)}: {row(finding)[1]}", err=True)
    if as_json:
        print_json({"file": str(file), "findings": [asdict(finding) for finding in findings]})
        return
    print_table(f"{device.name}, tuned into {file}", COLUMNS, map(row, findings), right=(3, 4, 5, 6))
    for finding in findings:
        for reason in finding.refused:
            click.echo(f"refused for {finding.entry.operation} {finding.entry.bucket}: {reason}", err=True)


def measured(problems: Sequence[Problem], file: Path, device: Device) -> Iterator[Finding]:
    """Sweep each problem; its entry is in `file` when its finding comes, so that Ctrl-C loses none."""
    from backbench.backends.tuning import table as tuning
    from backbench.backends.tuning.search import parallel_compiler, sweep

    table = tuning.read(file, tuning.place(device.arch, device.units))
    tuning.write(file, table)  # better now than after an hour
    with parallel_compiler(min(MOST_COMPILERS, os.cpu_count() or 1)) as compile_all:
        for problem in problems:
            finding = sweep(problem, compile_all)
            table = table.merged([finding.entry])
            tuning.write(file, table)
            yield finding


def row(finding: Finding) -> tuple[str, ...]:
    """One line of the printed table; times are in microseconds."""
    from backbench.backends.tuning.search import describe

    entry = finding.entry
    return (
        entry.operation,
        entry.bucket,
        entry.dtype,
        f"{finding.baseline_us:.1f} µs",
        f"{finding.best_us:.1f} µs",
        f"{finding.baseline_us / finding.best_us:.2f}×",
        f"{finding.tried}" + (f", {len(finding.refused)} refused" if finding.refused else ""),
        describe(entry.config),
    )


def _operations(text: str) -> set[str]:
    from backbench.errors import HarnessError

    asked = {part.strip() for part in text.split(",")}
    if unknown := asked - set(OPERATIONS):
        raise HarnessError(f"Cannot tune {', '.join(sorted(unknown))}; use {', '.join(OPERATIONS)}.")
    return asked


def _tuner(name: str) -> Tuner:
    from backbench.backends.registry import load, names
    from backbench.errors import HarnessError

    tuner = load(name).tuner
    if tuner is None:
        offered = [each for each in names() if load(each).tuner is not None]
        raise HarnessError(f"Backend {name!r} has nothing to tune; tune {' or '.join(offered)}.")
    return tuner


def _gpu(prefer: str | None) -> Device:
    from backbench.backends.interface.device import detect
    from backbench.errors import HarnessError

    device = detect(prefer=prefer)
    if device.vendor == "cpu":
        raise HarnessError(
            "bench tune times kernels, so it needs an NVIDIA or AMD GPU, and torch sees none here; "
            "runs without a tuned entry use written defaults."
        )
    return device


def _problems(
    tuner: Tuner,
    model: str,
    dtype_name: str,
    quantize: str,
    sparsity: str | None,
    kv_dtype: str | None,
    block_sizes: tuple[int, ...],
    operations: set[str],
    device: Device,
    tp: int,
) -> Iterator[Problem]:
    import torch

    from backbench.backends.interface import Scheme
    from backbench.backends.quantization import named
    from backbench.engine.limits import GPU_BLOCK_SIZE
    from backbench.engine.models.checkpoint import find_model

    config, dtype = find_model(model).config, getattr(torch, dtype_name)
    plain = [Scheme() if name == "none" else named(name) for name in quantize.split(",")]
    schemes = [replace(scheme, sparsity=sparsity) for scheme in plain]
    if "gemm" in operations:
        shapes = list(config.spec.divided(tp).product_shapes().values())
        yield from tuner.products(shapes, dtype, device, schemes)
    if "attention" in operations:
        sizes = block_sizes or (GPU_BLOCK_SIZE,)
        specs = [spec for size in sizes for spec in _specs(config, dtype, kv_dtype, size, device, tp)]
        yield from tuner.attention(specs, device)


def _specs(
    config: ModelConfig, dtype: torch.dtype, kv_dtype: str | None, block_size: int, device: Device, tp: int
) -> list[AttentionSpec]:
    import torch

    from backbench.engine.config import EngineConfig
    from backbench.engine.limits import realise_limits
    from backbench.engine.models.decoder import attention_specs

    limits = realise_limits(EngineConfig(block_size=block_size), config, device)
    kept = None if kv_dtype is None else getattr(torch, kv_dtype)
    found = attention_specs(config, dtype=dtype, limits=limits, kv_dtype=kept, world=tp)
    return list(dict.fromkeys(found))
