"""Skinny products beside the library's: `python benchmarks/gemm.py` writes benchmarks/parts/gemm.json.

`--sweep` tries many launches per shape and prints the fastest.
Weights rotate so that none is found in the cache, and each result is checked against fp32 first.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from backends.triton import gemm_choice
from backends.triton.gemm_choice import GemmConfig, choose
from backends.triton.launch import architecture
from backends.triton.skinny_launch import multiply
from benchmarks.graph_timing import Row, graph_time_us, write_rows

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
VECTOR_LAUNCHES = """16/256/4/3 8/1024/8/3 8/512/4/3 4/1024/4/3 16/256/4/1 8/512/4/1 4/1024/4/1 2/2048/4/1
4/2048/8/1 2/1024/2/1 4/512/2/1 8/1024/8/1 8/256/2/1 1/2048/2/1 4/4096/8/1 16/512/8/1 2/1024/4/1 4/512/4/1
2/2048/8/1"""
"""rows / depth / warps / stages of a tile"""
MATRIX_LAUNCHES = {
    16: """64/128/4/4s 64/128/4/3s 64/128/4/6s 128/128/8/4s 128/128/4/2s 16/256/2/5 16/256/2/6 32/256/4/6
32/256/4/4 32/512/4/4 16/512/2/5 8/512/2/6 16/512/2/3 64/256/4/3s""",
    32: "64/128/4/4s 64/128/4/3s 64/256/4/4s 32/512/4/3 128/128/8/2",
    64: "128/128/4/4 32/256/4/4 64/128/4/4 64/128/4/2",
}
"""As above; s = the weight is the wide operand."""
POOL_ELEMENTS = 151936 * 4096
COLD_BYTES = 2**30
"""The cache holds 60 MB: the weights of one graph exceed it many times."""
TOLERANCE = 4e-3
"""Relative error in norm: one rounding of the output to bf16 is about 1.7e-3."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--table", type=Path, help="measure with the findings of a sweep")
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 16, 32, 64])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "parts")
    options = parser.parse_args()
    if options.table is not None:
        use_table(options.table)
    chosen = {config for config in gemm_choice.MEASURED.values() if config is not None}
    tried = {config for rows in options.rows for config in candidates(rows)}
    compile_in_parallel(sorted(tried if options.sweep else chosen, key=repr))
    pool = WeightPool()
    if options.sweep:
        found: list[dict[str, Any]] = []
        for rows in options.rows:
            found += sweep(pool, rows)
            options.output.mkdir(parents=True, exist_ok=True)
            (options.output / "gemm_sweep.json").write_text(json.dumps(found, indent=1))
    else:
        write_rows(options.output / "gemm.json", list(measure(pool, (1, 2, 4, 8, 16, 32, 64, 128, 256))))


def use_table(path: Path) -> None:
    """Choose launches from a sweep's findings, where they beat the library clearly."""
    table = dict(gemm_choice.MEASURED)
    for found in json.loads(path.read_text()):
        best = found["best"] and GemmConfig(**found["best"])
        table["sm90", found["rows"], *found["shape"]] = best
    gemm_choice.MEASURED = table
    gemm_choice.choose.cache_clear()


class WeightPool:
    """One large random buffer; weights of any shape are views of it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.buffer = torch.empty(POOL_ELEMENTS, dtype=torch.bfloat16, device="cuda")
        for part in self.buffer.chunk(16):
            part.normal_(0, 0.02)

    def weights(self, n: int, k: int) -> list[Tensor]:
        """Distinct weights [n, k], together well above the cache (at least one)."""
        count = max(1, min(-(-COLD_BYTES // (n * k * 2)), POOL_ELEMENTS // (n * k)))
        return [self.buffer[i * n * k : (i + 1) * n * k].view(n, k) for i in range(count)]


def candidates(rows: int) -> Iterator[GemmConfig]:
    """Launches worth trying for `rows` rows: the fastest of a wide search over tiles, warps and stages."""
    if rows == 1:
        for text in VECTOR_LAUNCHES.split():
            n, k, warps, stages = (int(number) for number in text.split("/"))
            yield GemmConfig(0, n, k, warps, stages)
        return
    for text, lines in itertools.product(MATRIX_LAUNCHES[rows].split(), (0, 2, 4)):
        n, k, warps, stages = (int(number) for number in text.strip("s").split("/"))
        yield GemmConfig(max(rows, 16), n, k, warps, stages, text.endswith("s"), lines)


def compile_one(config: GemmConfig) -> str:
    """Compile one launch into the disk cache (in a worker process)."""
    try:
        k = max(config.block_k, 64)
        x = torch.zeros(16 if config.block_m else 1, k, dtype=torch.bfloat16, device="cuda")
        multiply(x, torch.zeros(256, k, dtype=torch.bfloat16, device="cuda"), config)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{config}: {type(error).__name__}: {str(error)[:200]}"
    return ""


def compile_in_parallel(configs: Sequence[GemmConfig]) -> None:
    """Fill Triton's disk cache from several processes, before this one touches the device."""
    with multiprocessing.get_context("spawn").Pool(14) as workers:
        for problem in workers.imap_unordered(compile_one, configs):
            if problem:
                print("compile:", problem)


def check(x: Tensor, weight: Tensor, actual: Tensor) -> float:
    """Relative error in norm against fp32, over the first rows of the weight and the last."""
    n = weight.shape[0]
    rows = torch.cat([torch.arange(min(n, 4096)), torch.arange(max(0, n - 4096), n)]).to(x.device)
    exact = x.float() @ weight[rows].float().T
    return float((actual[:, rows].float() - exact).norm() / exact.norm())


def time_config(
    pool: WeightPool,
    name: str,
    rows: int,
    config: GemmConfig | None,
    replays: int = 15,
    read_bytes: int = 4 * 2**30,
) -> tuple[float, float]:
    """(median, spread) us of one shape with `config` (None = the library), after checking it."""
    n, k = SHAPES[name]
    weights = pool.weights(n, k)
    x = torch.randn(rows, k, dtype=torch.bfloat16, device="cuda")
    if config is None:
        calls = [lambda w=w: functional.linear(x, w) for w in weights]
    else:
        error = check(x, weights[-1], multiply(x, weights[-1], config))
        if not error < TOLERANCE:
            raise RuntimeError(f"{name} m{rows} {config}: relative error {error:.2e}")
        calls = [lambda w=w: multiply(x, w, config) for w in weights]
    while len(calls) * n * k * 2 < read_bytes:
        calls = calls * 2
    return graph_time_us(calls, replays)


def sweep(pool: WeightPool, rows: int) -> list[dict[str, Any]]:
    """Every candidate on every shape; prints the library's time and the fastest launches."""
    found = []
    for name, (n, k) in SHAPES.items():
        library, _ = time_config(pool, name, rows, None, 5, COLD_BYTES)
        results = []
        for config in candidates(rows):
            if k % config.block_k:
                continue
            try:
                results.append((time_config(pool, name, rows, config, 5, COLD_BYTES)[0], config))
            except (ValueError, RuntimeError) as error:
                print(f"{name} m{rows} {short(config)}: {str(error)[:150]}")
        results.sort(key=lambda result: result[0])
        print(f"{name:19} m{rows:<2} floor {n * k * 2 / 4.1e6:5.1f} library {library:5.1f}", end=" ")
        print(" | ".join(f"{time:.2f} {short(config)}" for time, config in results[:4]), flush=True)
        best = results[0][1] if results[0][0] < 0.98 * library else None
        size = next(size for size in gemm_choice.BUCKETS if rows <= size)
        found.append(
            {
                "rows": size,
                "shape": [n, k],
                "library_us": library,
                "best": best and asdict(best),
                "results": [(round(time, 3), short(config)) for time, config in results],
            }
        )
    return found


def short(config: GemmConfig) -> str:
    """A launch in few characters."""
    kind = "v" if config.block_m == 0 else f"m{config.block_m}"
    tail = f"{'s' if config.swap else ''}{f'l{config.lines}' if config.lines else ''}"
    return f"{kind}n{config.block_n}k{config.block_k}w{config.warps}p{config.stages}{tail}"


def measure(pool: WeightPool, row_counts: Sequence[int]) -> Iterator[Row]:
    """The published rows: the library, and the backend's choice (the library where that is faster)."""
    arch = architecture(torch.device("cuda", 0))
    for name, rows in itertools.product(SHAPES, row_counts):
        value, spread = time_config(pool, name, rows, None)
        yield Row(f"gemm/{name}/m{rows}/bf16/cublas", round(value, 2), "us", round(spread, 2))
        config = choose(arch, rows, *SHAPES[name], torch.bfloat16)
        chosen = value
        if config is not None:
            chosen, spread = time_config(pool, name, rows, config)
        yield Row(f"gemm/{name}/m{rows}/bf16/triton", round(chosen, 2), "us", round(spread, 2))
        kind = "the library" if config is None else short(config)
        print(f"{name:20} m{rows:<3} cublas {value:7.2f} triton {chosen:7.2f} {kind}")


if __name__ == "__main__":
    main()
