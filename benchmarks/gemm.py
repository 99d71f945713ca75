"""Skinny products beside the library's: `python benchmarks/gemm.py` writes benchmarks/parts/gemm.json.

Weights rotate so that none is found in the cache, and each result is checked against fp32 first. Launches
are those of the backend's tuning table; `bench tune` writes it.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from backbench.backends.interface.device import gpu
from backbench.backends.triton.configs import ROW_BUCKETS, Product, choose
from backbench.backends.triton.gemm_tune import GemmProblem
from backbench.backends.tuning.search import describe
from benchmarks.graph_timing import Row, write_rows

SHAPES = {
    "28672x4096": (28672, 4096),
    "qwen3-8b/qkv": (6144, 4096),
    "qwen3-8b/o": (4096, 4096),
    "qwen3-8b/gate_up": (24576, 4096),
    "qwen3-8b/down": (4096, 12288),
    "qwen3-8b/lm_head": (151936, 4096),
    "qwen3-0.6b/qkv": (4096, 1024),
    "qwen3-0.6b/o": (1024, 2048),
    "qwen3-0.6b/gate_up": (6144, 1024),
    "qwen3-0.6b/down": (1024, 3072),
    "qwen3-0.6b/lm_head": (151936, 1024),
}
ROW_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
REPLAYS = 15
READ_BYTES = 4 * 2**30
"""Bytes of weights that one timed replay reads."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="*", default=list(ROW_COUNTS))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "parts")
    options = parser.parse_args()
    compile_in_parallel()
    write_rows(options.output / "gemm.json", list(measure(options.rows)))


def chosen(rows: int, n: int, k: int) -> Product | None:
    """What the backend launches on this device."""
    device = gpu(0)
    return choose(device.arch, device.units, rows, n, k, torch.bfloat16)


def compile_one(job: tuple[int, tuple[int, int]]) -> str:
    """Compile one launch into the disk cache (in a worker process)."""
    rows, (n, k) = job
    config = chosen(rows, n, k)
    if config is None:
        return ""
    try:
        GemmProblem(rows, n, k, torch.bfloat16, gpu(0)).compile(asdict(config))
    except Exception as error:
        return f"{config}: {type(error).__name__}: {str(error)[:200]}"
    return ""


def compile_in_parallel() -> None:
    """Fill Triton's disk cache from several processes, before this one touches the device."""
    with multiprocessing.get_context("spawn").Pool(14) as workers:
        for problem in workers.imap_unordered(compile_one, itertools.product(ROW_BUCKETS, SHAPES.values())):
            if problem:
                print("compile:", problem)


def measure(row_counts: Sequence[int]) -> Iterator[Row]:
    """The published rows: the library, and the backend's choice (the library where that is faster)."""
    for name, rows in itertools.product(SHAPES, row_counts):
        n, k = SHAPES[name]
        problem = GemmProblem(rows, n, k, torch.bfloat16, gpu(0), read_bytes=READ_BYTES, replays=REPLAYS)
        value, spread = problem.time_us(None)
        yield Row(f"gemm/{name}/m{rows}/bf16/cublas", round(value, 2), "us", round(spread, 2))
        config = chosen(rows, n, k)
        launch = None if config is None else asdict(config)
        best = value
        if launch is not None:
            error = problem.error(launch)
            if not error < problem.tolerance:
                raise SystemExit(f"{name} m{rows} {config}: relative error {error:.2e}")
            best, spread = problem.time_us(launch)
        yield Row(f"gemm/{name}/m{rows}/bf16/triton", round(best, 2), "us", round(spread, 2))
        print(f"{name:20} m{rows:<3} cublas {value:7.2f} triton {best:7.2f} {describe(launch)}")


if __name__ == "__main__":
    main()
