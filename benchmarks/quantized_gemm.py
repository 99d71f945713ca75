"""Quantized products beside bf16 ones: `benchmarks/quantized_gemm.py` writes parts/quantized_gemm.json.

Weights rotate so that none is found in the cache, calls stand in a CUDA graph, and each result is checked
against `quantization.product` first. `--tune` tries every launch and writes the fastest into the backend's
tuning table; without it the backend's choice is measured. `--decode --tune` does so for what decodes of
qwen3-8b need, the most telling first, and takes a few minutes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from backbench.backends.interface import Config, Device, Scheme
from backbench.backends.interface.device import gpu
from backbench.backends.quantization import SCHEMES as QUANTIZED
from backbench.backends.quantization import dequantize
from backbench.backends.triton import configs, quantized_configs
from backbench.backends.triton.gemm_tune import dense_product_us
from backbench.backends.triton.quantized_configs import BUCKETS, Expanded
from backbench.backends.triton.quantized_tune import QuantizedProblem
from backbench.backends.tuning import search, table
from backbench.backends.tuning.timing import graph_time_us
from backbench.errors import BackendError
from benchmarks.graph_timing import conditions

SHAPES = {
    "28672x4096": (28672, 4096),
    "qkv": (6144, 4096),
    "attention_output": (4096, 4096),
    "gate_up": (24576, 4096),
    "down": (4096, 12288),
    "head": (151_936, 4096),
}
"""[n, k]; the named ones are those of qwen3-8b."""
SCHEMES = {**QUANTIZED, "2:4": Scheme(sparsity="2:4")}
"""What is measured, by name."""
ROWS = (1, 16, 32, 64, 128, 256, 8192)
BF16 = torch.bfloat16
REPLAYS = 15
Job = tuple[int, str, str]
"""Rows, shape, scheme."""
LAYER = ("qkv", "attention_output", "gate_up", "down")
DECODE: tuple[tuple[tuple[int, ...], tuple[str, ...], tuple[str, ...]], ...] = (
    ((1,), LAYER, ("fp8", "int4-g128")),
    ((16,), LAYER, ("fp8", "int4-g128")),
    ((1,), ("head",), ("fp8", "int4-g128")),
    ((1, 16), LAYER, ("int8", "nvfp4")),
    ((64,), LAYER[:2], ("fp8", "int4-g128")),
)
"""Rows, shapes and schemes of `--decode`, what matters most first."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="*", default=list(ROWS))
    usual = ["28672x4096", "gate_up", "down"]
    parser.add_argument("--shapes", nargs="*", default=usual, choices=list(SHAPES))
    parser.add_argument("--schemes", nargs="*", default=list(SCHEMES), choices=list(SCHEMES))
    parser.add_argument("--decode", action="store_true", help="instead: what few sequences of qwen3-8b need")
    parser.add_argument("--tune", action="store_true", help="try every launch, and keep the fastest")
    parser.add_argument("--seconds", type=float, default=480, help="begin no further case after these")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "parts")
    options = parser.parse_args()
    groups = [list(itertools.product(options.rows, options.shapes, options.schemes))]
    if options.decode:
        groups = [[*itertools.product(*group)] for group in DECODE]
    until = time.monotonic() + options.seconds
    found: list[dict[str, Any]] = []
    options.output.mkdir(parents=True, exist_ok=True)
    for row in measure(groups, options.tune, until):
        found.append(row)
        record = {"conditions": conditions(), "clocks": clocks(), "rows": found}
        (options.output / "quantized_gemm.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"{len(found)} of {sum(map(len, groups))} cases")
    if options.tune:
        shutil.copy(configs.table_file(gpu(0).arch, gpu(0).units), options.output)
        for row in found:
            if "/m1/" in row["name"]:
                print(f"{row['name']:48}{row['before_us']:8.1f} -> {row['us']:.1f} us")


def clocks() -> str:
    """What the card runs at."""
    query = ["nvidia-smi", "--query-gpu=name,clocks.sm,clocks.mem,power.draw", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()


def problem_of(job: Job, device: Device) -> QuantizedProblem:
    """The product of a job."""
    rows, shape, scheme = job
    return QuantizedProblem(rows, *SHAPES[shape], SCHEMES[scheme], BF16, device, replays=REPLAYS)


def measure(groups: Sequence[Sequence[Job]], tune: bool, until: float) -> Iterator[dict[str, Any]]:
    """A row a job, until the time is over."""
    dense: dict[tuple[int, str], dict[str, float]] = {}
    with ExitStack() as stack:
        compilers = stack.enter_context(multiprocessing.get_context("spawn").Pool(14)) if tune else None
        for jobs in groups:
            if compilers is not None:
                # Before any of the group is timed: compilers start what they made.
                work = {key: each for job in jobs for key, each in launches(job)}
                for fault in compilers.imap_unordered(compile_one, work.values()):
                    print(fault, end="", file=sys.stderr)
                    if time.monotonic() > until:
                        return
            for job in jobs:
                if time.monotonic() > until:
                    return
                rows, shape, _ = job
                if (rows, shape) not in dense:
                    dense[rows, shape] = dense_us(rows, *SHAPES[shape])
                yield one(job, dense[rows, shape], tune)


def launches(job: Job) -> Iterator[tuple[tuple[Any, ...], tuple[Job, Config]]]:
    """What may serve the job, with the job, each after what tells its kernel from those of other jobs."""
    _, shape, scheme = job
    for config in problem_of(job, gpu(0)).candidates():
        depth = SHAPES[shape][1] if config.get("block_m") == 0 else None
        yield (scheme, depth, *config.items()), (job, config)


def compile_one(work: tuple[Job, Config]) -> str:
    """Compile into Triton's cache on disk; gives what goes wrong, which the sweep meets again."""
    job, config = work
    try:
        problem_of(job, gpu(0)).compile(config)
    except Exception as fault:
        return f"{job} {search.describe(config)}: {str(fault)[:100]}\n"
    return ""


def dense_us(rows: int, n: int, k: int) -> dict[str, float]:
    """The library's bf16 product, and ours."""
    return dense_product_us(rows, n, k, BF16, gpu(0), REPLAYS)


def bare_us(problem: QuantizedProblem) -> dict[str, float]:
    """The library's product of codes alone, rows already rounded and nothing scaled but by `_scaled_mm`; of a
    2:4 weight the ways that are not our kernels'."""
    from backbench.backends.triton.quantized import rounded

    scheme = problem.scheme
    if scheme.compressed:
        return sparse_us(problem)
    if problem.rows <= BUCKETS[1] or scheme.group is not None or scheme.activation is None:
        return {}
    rows = rounded(problem.x, problem.weights[0])
    assert rows.scale is not None
    name, calls = "torch._int_mm", [partial(torch._int_mm, rows.x, each.codes.T) for each in problem.weights]
    if scheme.weight == "fp8":
        name, more = "torch._scaled_mm", {"scale_a": rows.scale[:, None], "out_dtype": BF16}
        calls = [
            partial(torch._scaled_mm, rows.x, each.codes.T, scale_b=each.scale.T, use_fast_accum=True, **more)
            for each in problem.weights
        ]
    return {name: graph_time_us(calls, problem.replays)[0]}


def sparse_us(problem: QuantizedProblem) -> dict[str, float]:
    """The ways of a 2:4 product that are not our kernels', and torch's weight kept in its own form; what
    cannot be done here is said and left out."""
    libraries = quantized_configs.semi_structured(problem.device.arch, problem.n, problem.k, BF16)
    ways: dict[str, Callable[[], float]] = {
        quantized_configs.describe(way): partial(way_us, problem, asdict(way))
        for way in (Expanded(), *libraries)
    }
    found = {}
    for name, measured in {**ways, "torch.sparse": partial(torch_us, problem)}.items():
        try:
            found[name] = measured()
        except (BackendError, RuntimeError, ValueError, NotImplementedError, ArithmeticError) as fault:
            print(f"{name}: {type(fault).__name__}: {str(fault).splitlines()[0][:160]}", file=sys.stderr)
    return found


def way_us(problem: QuantizedProblem, way: Config) -> float:
    """One way of a product, checked and timed."""
    if not (error := problem.error(way)) < problem.tolerance:
        raise ArithmeticError(f"relative error {error:.2e}")
    return problem.time_us(way)[0]


def torch_us(problem: QuantizedProblem) -> float:
    """torch's linear layer with a weight from `to_sparse_semi_structured`, checked and timed."""
    dense = dequantize(problem.canonical, BF16)
    weights = [torch.sparse.to_sparse_semi_structured(dense) for _ in problem.weights]
    calls = [partial(torch.nn.functional.linear, problem.x, each) for each in weights]
    some, exact = problem.expected
    error = float((calls[0]()[-64:, some].float() - exact).norm() / exact.norm())
    if not error < problem.tolerance:
        raise ArithmeticError(f"relative error {error:.2e}")
    return graph_time_us(calls, problem.replays)[0]


def one(job: Job, dense: Mapping[str, float], tune: bool) -> dict[str, Any]:
    """Check, tune if asked, and time one product."""
    rows, shape, name = job
    problem = problem_of(job, gpu(0))
    device = problem.device
    refused: Sequence[str] = ()
    place = (device.arch, device.units)
    way = vars(quantized_configs.choose(*place, rows, problem.n, problem.k, problem.scheme, BF16))
    before: float | None = None
    if tune:
        before = problem.time_us(way)[0]
        finding = search.sweep(problem)
        refused = finding.refused
        file = configs.table_file(*place)
        known = table.read(file, table.place(*place))
        table.write(file, known.merged([finding.entry]))
        assert finding.entry.config is not None
        way = dict(finding.entry.config)
    error = problem.error(way)
    if not error < problem.tolerance:
        raise SystemExit(f"{job} {way}: relative error {error:.2e}")
    value, spread = problem.time_us(way)
    bandwidth = problem.weights[0].num_bytes / value / 1e6
    operations = 2 * rows * problem.n * problem.k / value / 1e6
    best = min(dense.values())
    bare = bare_us(problem)
    print(
        f"m{rows:<5}{shape:17}{name:10}{value:8.1f} us {bandwidth:5.2f} TB/s {operations:6.0f} TFLOP/s "
        f"x{best / value:4.2f} of bf16 {best:.1f}  {search.describe(way)}  error {error:.1e}"
        + ("" if before is None else f"  before {before:.1f}")
        + "".join(f"  {name} {time_us:.1f}" for name, time_us in bare.items())
        + (f"  ({len(refused)} refused: {refused[0]})" if refused else ""),
        flush=True,
    )
    return {
        "name": f"quantized_gemm/{shape}/m{rows}/{name}",
        "us": round(value, 2),
        "spread_us": round(spread, 2),
        "before_us": None if before is None else round(before, 2),
        "weight_bytes": problem.weights[0].num_bytes,
        "bf16_us": {each: round(time_us, 2) for each, time_us in dense.items()},
        "codes_alone_us": {each: round(time_us, 2) for each, time_us in bare.items()},
        "error": error,
        "way": dict(way),
        "refused": list(refused),
    }


if __name__ == "__main__":
    main()
