"""Elementwise operations and sampling beside torch's: writes benchmarks/parts/operations.json.

Each result is checked against the torch backend first.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from backbench.backends.interface import AttentionSpec, Rotary, Rotation, SamplingBatch
from backbench.backends.noise import noise_key
from backbench.backends.torch.operations import TorchOperations
from backbench.backends.triton.cache import new_cache
from backbench.backends.triton.fused_write import rotate_and_write
from backbench.backends.triton.operations import TritonOperations
from backbench.backends.tuning.timing import graph_time_us
from benchmarks.graph_timing import Row, write_rows

VOCABULARY = 151936
COLD_BYTES = 200 * 2**20
BF16 = torch.bfloat16
TORCH, TRITON = TorchOperations(), TritonOperations()
BOTH = (TORCH, TRITON)
TOKENS = (1, 64, 16384)
DTYPES = (BF16, torch.float32)
KINDS = ("greedy", "temperature", "filtered")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "parts")
    options = parser.parse_args()
    compile_in_parallel()
    torch.manual_seed(0)
    check_draws()
    rows = [*elementwise_rows(), *sampling_rows()]
    for row in rows:
        print(f"{row.name:52} {row.value:9.2f} {row.unit}")
    write_rows(options.output / "operations.json", rows)


def random(*shape: int) -> Tensor:
    """A bf16 tensor of normal values on the device."""
    return torch.randn(*shape, dtype=BF16, device="cuda")


def timed(name: str, bytes_moved: int, ways: dict[str, Callable[[int], Any]], copies: int) -> Iterator[Row]:
    """Rows of each way: its call is given the number of the buffer to use."""
    calls = max(copies, min(64, 1 + 2**28 // max(bytes_moved, 1)))
    for way, call in ways.items():
        value, spread = graph_time_us([lambda i=i, call=call: call(i % copies) for i in range(calls)], 9)
        yield Row(f"{name}/{way}", round(value, 2), "us", round(spread, 2))
    yield Row(f"{name}/bytes_at_4.1TB_per_s", round(bytes_moved / 4.1e6, 2), "us", 0.0)


def close(name: str, actual: Tensor, expected: Tensor) -> None:
    """Two roundings to bf16 apart at most, in norm."""
    error = float((actual.float() - expected.float()).norm() / expected.float().norm())
    if not error < 5e-3:
        raise SystemExit(f"{name}: relative difference {error:.2e} from torch")


def copies_of(shape_bytes: int) -> int:
    """Buffers needed to stay out of the cache, at most 16."""
    return max(1, min(16, COLD_BYTES // shape_bytes))


def elementwise_rows() -> Iterator[Row]:
    """Norm, gate, embedding and rotate-and-write at one, 64 and 16,384 tokens of qwen3-8b's layer."""
    for tokens in TOKENS:
        for rows in (norm_rows, gate_rows, embed_rows, rotate_rows):
            yield from rows(tokens)


def norm_rows(tokens: int, hidden: int = 4096, eps: float = 1e-6) -> Iterator[Row]:
    """Residual sum and norm."""
    count = copies_of(tokens * hidden * 2)
    x, carried = ([random(tokens, hidden) for _ in range(count)] for _ in range(2))
    weight = random(hidden)
    expected, _ = TORCH.add_rms_norm(x[0], carried[0], weight, eps)
    close("add_rms_norm", TRITON.add_rms_norm(x[0], carried[0].clone(), weight, eps)[0], expected)
    ways = {ops.name: lambda i, ops=ops: ops.add_rms_norm(x[i], carried[i], weight, eps) for ops in BOTH}
    yield from timed(f"operations/add_rms_norm/{tokens}x{hidden}/bf16", 8 * tokens * hidden, ways, count)


def gate_rows(tokens: int, inner: int = 12288) -> Iterator[Row]:
    """silu(gate) * up."""
    count = copies_of(tokens * inner * 4)
    stacked = [random(tokens, 2 * inner) for _ in range(count)]
    close("gate", TRITON.gate(stacked[0]), TORCH.gate(stacked[0]))
    ways = {ops.name: lambda i, ops=ops: ops.gate(stacked[i]) for ops in BOTH}
    yield from timed(f"operations/gate/{tokens}x{inner}/bf16", 6 * tokens * inner, ways, count)


def embed_rows(tokens: int, hidden: int = 4096) -> Iterator[Row]:
    """Gathering rows of the embedding."""
    table = random(VOCABULARY, hidden)
    ids = torch.randint(VOCABULARY, (tokens,), device="cuda")
    close("embed", TRITON.embed(ids, table), TORCH.embed(ids, table))
    ways = {ops.name: lambda i, ops=ops: ops.embed(ids, table) for ops in BOTH}
    yield from timed(f"operations/embed/{tokens}x{hidden}/bf16", 4 * tokens * hidden, ways, 1)


def rotate_rows(tokens: int) -> Iterator[Row]:
    """The fused norm, rotation and cache write of qwen3-8b's heads beside torch's separate ones."""
    spec = AttentionSpec(32, 8, 128, BF16, BF16, 16, 128**-0.5)
    width = (32 + 16) * 128
    count = copies_of(tokens * width * 2)
    qkv = [random(tokens, width) for _ in range(count)]
    rotary = Rotary(torch.randn(40960, 128, device="cuda"), 128)
    positions = torch.randint(40960, (tokens,), device="cuda")
    norm = random(128)
    rotation = Rotation(rotary, norm, norm)
    cache = new_cache(tokens // 16 + 8, 8, 16, 128, BF16, torch.device("cuda"))
    slots = torch.randperm((tokens // 16 + 8) * 16, device="cuda")[:tokens]
    keys, values = (torch.empty_like(t).view(-1, 8, 128) for t in (cache.k, cache.v))

    def reference(i: int) -> Tensor:
        q, k, v = TORCH.rotate(qkv[i], positions, rotation, spec)
        keys[slots], values[slots] = k, v
        return q

    def fused(i: int) -> Tensor:
        return rotate_and_write(qkv[i], positions, rotation, cache, slots, spec)

    close("rotate", fused(0), reference(0))
    close("keys", cache.k.transpose(1, 2).reshape(-1, 8, 128)[slots], keys[slots])
    ways = {"torch": reference, "triton": fused}
    yield from timed(f"operations/rotate_and_write/{tokens}/bf16", 2 * tokens * width * 2, ways, count)


def batch(rows: int, kind: str) -> SamplingBatch:
    """Parameters of `rows` rows that are all greedy, all at a temperature, or all filtered."""
    filtered = kind == "filtered"
    return SamplingBatch(
        temperature=torch.full((rows,), 0.0 if kind == "greedy" else 0.6, device="cuda"),
        top_k=torch.full((rows,), 50 if filtered else 0, dtype=torch.int32, device="cuda"),
        top_p=torch.full((rows,), 0.9 if filtered else 1.0, device="cuda"),
        min_p=torch.full((rows,), 0.02 if filtered else 0.0, device="cuda"),
        noise_key=torch.tensor([noise_key(7, i) for i in range(rows)], device="cuda"),
        all_greedy=kind == "greedy",
        any_filter=filtered,
    )


def check_draws() -> None:
    """The draws of thousands of rows equal torch's; at most one in a thousand may differ (float ties)."""
    for dtype, kind in itertools.product(DTYPES, KINDS):
        differ = total = 0
        for seed in range(4):
            sampling = batch(256, kind)
            sampling.noise_key = torch.tensor([noise_key(seed, i) for i in range(256)], device="cuda")
            if kind == "filtered":
                sampling.top_k = torch.randint(0, 200, (256,), dtype=torch.int32, device="cuda")
                sampling.top_p = torch.rand(256, device="cuda") * 0.6 + 0.4
                sampling.min_p = torch.rand(256, device="cuda") * 0.1
                sampling.temperature[::7] = 0
            logits = (torch.randn(256, VOCABULARY, device="cuda") * 3).to(dtype)
            drawn = TRITON.sample(logits, sampling)
            differ += int((drawn != TORCH.sample(logits, sampling)).sum())
            total += 256
        print(f"draws {kind:11} {dtype}: {differ} of {total} differ from torch")
        if differ > total // 1000:
            raise SystemExit(f"{kind} draws differ from torch's")


def sampling_rows() -> Iterator[Row]:
    """Greedy, temperature and filtered sampling from 1, 64 and 256 rows of logits."""
    for rows, dtype, kind in itertools.product((1, 64, 256), DTYPES, KINDS):
        yield from sample_rows(rows, dtype, kind)


def sample_rows(rows: int, dtype: torch.dtype, kind: str) -> Iterator[Row]:
    """One kind of sampling."""
    moved = rows * VOCABULARY * dtype.itemsize
    count = copies_of(moved)
    logits = [(torch.randn(rows, VOCABULARY, device="cuda") * 3).to(dtype) for _ in range(count)]
    sampling = batch(rows, kind)
    name = f"operations/sample/{kind}/{rows}x{VOCABULARY}/{'bf16' if dtype == BF16 else 'fp32'}"
    yield from timed(name, moved, {"triton": lambda i: TRITON.sample(logits[i], sampling)}, count)


def compile_job(job: tuple[Any, ...]) -> str:
    """Run one case once in a worker process, so that its kernels lie in the disk cache."""
    try:
        kind, *arguments = job
        if kind == "sample":
            dtype, way = arguments
            TRITON.sample(torch.randn(1, VOCABULARY, device="cuda").to(dtype), batch(1, way))
            TRITON.sample(torch.randn(64, VOCABULARY, device="cuda").to(dtype), batch(64, way))
        elif kind == "chunk":
            logits = random(1, VOCABULARY)
            outputs = (
                torch.empty(1, 999, device="cuda"),
                torch.empty(1, 999, dtype=torch.int32, device="cuda"),
            )
            arguments[0].call(logits, batch(1, "temperature"), *outputs)
        else:
            (tokens,) = arguments
            x = random(tokens, 4096)
            TRITON.add_rms_norm(x, x.clone(), x[0], 1e-6)
            TRITON.gate(random(tokens, 24576))
            TRITON.embed(torch.zeros(tokens, dtype=torch.int64, device="cuda"), x)
            for _ in rotate_rows(tokens):
                pass
        torch.cuda.synchronize()
    except Exception as error:
        return f"{job}: {type(error).__name__}: {str(error)[:300]}"
    return ""


def compile_in_parallel() -> None:
    """Fill Triton's disk cache from several processes, before this one touches the device."""
    jobs = [("sample", *case) for case in itertools.product(DTYPES, KINDS)]
    jobs += [("elementwise", tokens) for tokens in TOKENS]
    with multiprocessing.get_context("spawn").Pool(12) as workers:
        for problem in workers.imap_unordered(compile_job, jobs):
            if problem:
                print("compile:", problem)


if __name__ == "__main__":
    main()
