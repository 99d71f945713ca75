"""Paged attention rows: `python benchmarks/attention.py` writes benchmarks/parts/attention.json.

32 query and 8 kv heads of 128, bf16, blocks in a random permutation, in a captured graph, with block
tables rotating over the pool so that no call finds its keys in the cache. Every row is checked against
fp32 first. Ragged rows hold sequences of 100 to 1,700 keys, with and without the lead-in that counts what
opening a sequence costs. `--scan decode|prefill` times other launch configurations instead and prints a
table; `--check` runs the conformance cases of a GPU's worth of geometries.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from backbench.backends.interface import AttentionRunner, AttentionSpec
from backbench.backends.interface.device import gpu
from backbench.backends.triton import tune
from backbench.backends.triton.attention import TritonRunner
from backbench.backends.triton.tune import AttentionProblem
from backbench.backends.triton.tune import Pool as KeyPool
from benchmarks.attention_variants import Variant, variants
from benchmarks.graph_timing import Row, write_rows

Q_HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
POOL_KEYS = 64 * 16384
DECODE_ROWS = tuple(
    (batch, context)
    for batch, contexts in {
        1: (1024, 4096, 16384), 16: (1024, 4096, 16384), 64: (1024, 4096, 16384), 256: (1024, 4096)
    }.items()
    for context in contexts
)  # fmt: skip
PREFILL_ROWS = ((1, 4096), (8, 2048), (1, 16384))
RAGGED_ROWS = (256, 128, 48)
TARGETS_US = {
    (1, 1024): 11.5, (1, 4096): 14.2, (1, 16384): 27.0,
    (16, 1024): 27.2, (16, 4096): 75.6, (16, 16384): 262.7,
    (64, 1024): 81.8, (64, 4096): 263.3, (64, 16384): 997.3, (256, 1024): 290.8, (256, 4096): 1012.2,
}  # fmt: skip
"""What a decode row may take at most: FlashAttention-3's time on the same chip * 1.05."""


class Pool(KeyPool):
    """Random keys and values of `POOL_KEYS` tokens."""

    def __init__(self) -> None:
        super().__init__(make_spec(16), POOL_KEYS, 16384, torch.device("cuda"))


def make_spec(block_size: int) -> AttentionSpec:
    return AttentionSpec(
        Q_HEADS, KV_HEADS, HEAD_DIM, torch.bfloat16, torch.bfloat16, block_size, HEAD_DIM**-0.5,
        max_seqs=256, max_tokens=16384, max_len=16384,
    )  # fmt: skip


def measure(
    pool: KeyPool, runner: AttentionRunner, sequences: int, context: int, query: int
) -> tuple[float, float]:
    """(microseconds, spread) of one call, after checking its result (see `tune.measure`)."""
    return tune.measure(pool, runner, [context] * sequences, query)


def causal_tflops(sequences: int, length: int, time_us: float) -> float:
    """4 * d * heads * n^2 / 2 operations a sequence."""
    return 2 * HEAD_DIM * Q_HEADS * length**2 * sequences / time_us / 1e6


def row_name(block_size: int) -> str:
    """Blocks of 16 keys need no mention."""
    return "triton" if block_size == 16 else f"triton-block{block_size}"


def final_rows(pool: Pool, block_size: int) -> Iterator[Row]:
    """The rows of the table, with the written configuration."""
    name = row_name(block_size)
    runner = TritonRunner(make_spec(block_size), gpu(0))
    for sequences, context in DECODE_ROWS:
        value, spread = measure(pool, runner, sequences, context, 1)
        target = TARGETS_US[sequences, context]
        rate = sequences * context * 4 * KV_HEADS * HEAD_DIM / value / 1e6
        print(
            f"{name} decode {sequences}x{context}: {value:.1f} us (at most {target}), {rate:.2f} TB/s",
            flush=True,
        )
        yield Row(f"attention/decode/{sequences}x{context}/{name}", value, "us", spread)
    for sequences, length in PREFILL_ROWS:
        value, spread = measure(pool, runner, sequences, length, length)
        rate = causal_tflops(sequences, length, value)
        print(f"{name} prefill {sequences}x{length}: {value:.1f} us, {rate:.0f} TFLOP/s", flush=True)
        yield Row(f"attention/prefill/{sequences}x{length}/{name}", value, "us", spread)


def ragged_rows(pool: Pool, block_size: int) -> Iterator[Row]:
    """Decodes of sequences whose lengths differ, with and without a lead-in."""
    name = row_name(block_size)
    generator = random.Random(0)
    for sequences in RAGGED_ROWS:
        lengths = [generator.randint(100, 1700) for _ in range(sequences)]
        for label, decode in ((name, {}), (f"{name}-no-lead-in", {"LEAD_IN": 0})):
            runner = TritonRunner(make_spec(block_size), gpu(0), decode=decode)
            value, spread = tune.measure(pool, runner, lengths, 1)
            rate = sum(lengths) * 4 * KV_HEADS * HEAD_DIM / value / 1e6
            print(f"{label} decode {sequences} ragged: {value:.1f} us, {rate:.2f} TB/s", flush=True)
            yield Row(f"attention/decode/{sequences}xragged/{label}", value, "us", spread)


def scan(pool: Pool, kind: str, variants: tuple[Variant, ...], deadline_s: float) -> list[dict[str, Any]]:
    """Time every variant on every row of `kind` until the deadline (monotonic seconds)."""
    rows = DECODE_ROWS if kind == "decode" else PREFILL_ROWS
    found = []
    print(f"{kind}: " + " ".join(f"{s}x{n}" for s, n in rows))
    for variant in variants:
        if time.monotonic() > deadline_s:
            print("out of time")
            break
        times: list[float] = []
        try:
            runner = variant.runner(make_spec(variant.block_size), gpu(0))
            for sequences, length in rows:
                query = 1 if kind == "decode" else length
                times.append(measure(pool, runner, sequences, length, query)[0])
        except Exception as error:
            print(variant.name, "failed:", str(error).splitlines()[0][:100])
            continue
        shown = (
            times if kind == "decode" else [causal_tflops(*r, t) for r, t in zip(rows, times, strict=True)]
        )
        print(f"{variant.name:44s} " + " ".join(f"{value:6.1f}" for value in shown), flush=True)
        found.append({"variant": variant.name, "kind": kind, "times_us": times})
    return found


def compile_in_parallel(kind: str, variants: tuple[Variant, ...]) -> None:
    """Fill the compiler's disk cache with every variant's binary, on all cores."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(14, os.cpu_count() or 1)) as workers:
        workers.map(partial(_compile, kind), variants, chunksize=1)


def _compile(kind: str, variant: Variant) -> None:
    try:
        spec, replaced = make_spec(variant.block_size), variant.decode or variant.prefill
        AttentionProblem.of(spec, kind, gpu(0)).compile(replaced)
    except Exception as error:
        print(variant.name, "does not run:", str(error).splitlines()[0][:100], flush=True)


def check_cases() -> None:
    """Every conformance case of attention on this GPU, on all cores; prints the failures."""
    from benchmarks.attention_variants import run_case, small_cases

    context = multiprocessing.get_context("spawn")
    cases = small_cases()
    with context.Pool(min(14, os.cpu_count() or 1)) as workers:
        problems = [line for line in workers.map(run_case, cases, chunksize=1) if line]
    print(f"{len(cases) - len(problems)} of {len(cases)} cases right", *problems, sep="\n  ", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scan", choices=("decode", "prefill"), nargs="*", default=[])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--no-rows", action="store_true")
    parser.add_argument("--block-sizes", type=int, nargs="*", default=[16, 64])
    parser.add_argument("--seconds", type=float, default=600.0, help="stop scanning after this long")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "parts")
    options = parser.parse_args()
    deadline_s = time.monotonic() + options.seconds
    if options.check:
        check_cases()
    lists = {
        kind: tuple(
            variant
            for block_size in options.block_sizes
            for variant in variants(kind, make_spec(block_size), gpu(0))
        )
        for kind in options.scan
    }
    for kind in options.scan:
        compile_in_parallel(kind, lists[kind])
    print(f"{options.seconds - deadline_s + time.monotonic():.0f} s of preparation", flush=True)
    pool = Pool()
    if not options.no_rows:
        rows = [row for block_size in options.block_sizes for row in final_rows(pool, block_size)]
        rows += [row for block_size in options.block_sizes for row in ragged_rows(pool, block_size)]
        write_rows(options.output / "attention.json", rows)
    found = [entry for kind in options.scan for entry in scan(pool, kind, lists[kind], deadline_s)]
    if found:
        (options.output / "attention_scan.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
