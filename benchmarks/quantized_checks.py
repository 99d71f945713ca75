"""What quantization promises of a GPU, checked on this one; writes parts/quantized_checks.json.

    python benchmarks/quantized_checks.py [--only conformance,cache,memory] [--tune [--seconds 150]]

conformance   `bench backends --check triton`: every scheme, norm and gate that leave codes
cache         decode attention of 64 sequences of 16,384 tokens, fp8 and int8 caches beside bf16, a graph;
              `--tune` tries every launch of decode attention first, and keeps the fastest
memory        the most that is allocated while `shape:qwen3-8b` is rounded and packed, beside its weights
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from backbench.backends.conformance import check
from backbench.backends.interface import AttentionSpec
from backbench.backends.interface.device import gpu
from backbench.backends.quantization import FP8
from backbench.backends.registry import select
from backbench.backends.triton import configs
from backbench.backends.triton.attention import TritonRunner
from backbench.backends.triton.tune import AttentionProblem, Pool, equal, measure
from backbench.backends.tuning import search, table
from backbench.engine.config import EngineConfig
from backbench.engine.limits import realise_limits
from backbench.engine.models.checkpoint import find_model
from backbench.engine.models.decoder import Decoder, attention_specs
from backbench.engine.models.on_the_fly import OnTheFly
from benchmarks.graph_timing import conditions

BF16 = torch.bfloat16
SMALLER = (FP8, torch.int8)
"""What a cache is kept in beside bf16."""
SEQUENCES, LENGTH = 64, 16384
LAYER = AttentionSpec(32, 8, 128, BF16, BF16, 64, 128**-0.5, max_seqs=SEQUENCES, max_len=LENGTH)
"""One layer's attention of qwen3-8b."""
MODEL = "shape:qwen3-8b"
SCHEMES = ("fp8", "int8", "int4-g128", "nvfp4")
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--seconds", type=float, default=150, help="tune nothing more after these")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "parts")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"conditions": conditions()}
    for name in options.only.split(","):
        if name == "cache" and options.tune:
            tune_decode(options.output, options.seconds)
        record[name] = PARTS[name]()
        (options.output / "quantized_checks.json").write_text(json.dumps(record, indent=1) + "\n")
        gc.collect()
        torch.cuda.empty_cache()


def conformance() -> dict[str, Any]:
    """Counts by status, and what was wrong."""
    matrix = check("triton", gpu(0), dtypes=[BF16, torch.float16])
    wrong = [f"{row.operation} {row.case} {row.dtype}: {row.detail}" for row in matrix.wrong]
    print(f"conformance: {matrix.counts()}", *wrong, sep="\n", flush=True)
    return {"counts": matrix.counts(), "wrong": wrong}


def tune_decode(output: Path, seconds: float) -> None:
    """The fastest right launches of decode attention go into the backend's table, caches of bytes first."""
    device, until = gpu(0), time.monotonic() + seconds
    file, place = configs.table_file(device.arch, device.units), table.place(device.arch, device.units)
    layers = [
        *(replace(LAYER, kv_dtype=kept) for kept in SMALLER),
        *(replace(LAYER, block_size=size) for size in (64, 16, 128)),
    ]
    with search.parallel_compiler(14) as compile_all:
        for spec, kind in itertools.product(layers, ("decode", "decode_small")):
            problem = AttentionProblem.of(spec, kind, device)
            if spec.kv_dtype in SMALLER and kind == "decode":
                problem.shapes = (*problem.shapes, (SEQUENCES, LENGTH))
            if time.monotonic() > until:
                print(f"not tuned: {problem.bucket} {problem.dtype}")
                continue
            finding = search.sweep(problem, compile_all)
            table.write(file, table.read(file, place).merged([finding.entry]))
            told = search.describe(finding.entry.config)
            times = f"{finding.baseline_us:.1f} -> {finding.best_us:.1f} us"
            print(f"{problem.bucket} {problem.dtype}: {times}, {told}", flush=True)
    configs.table.cache_clear()
    shutil.copy(file, output)


def cache() -> dict[str, Any]:
    """Microseconds of one layer's decode attention, checked first, by what keys and values are kept in."""
    found: dict[str, Any] = {}
    for kept in (BF16, *SMALLER):
        spec = replace(LAYER, kv_dtype=kept)
        torch.manual_seed(0)
        pool = Pool(spec, SEQUENCES * LENGTH, SEQUENCES, gpu(0).torch_device)
        value, spread = measure(pool, TritonRunner(spec, gpu(0)), equal((SEQUENCES, LENGTH)), 1)
        num_bytes = SEQUENCES * LENGTH * spec.kv_bytes_per_token
        name = str(kept).removeprefix("torch.")
        found[name] = {"us": value, "spread_us": spread, "bytes_per_s": num_bytes / value * 1e6}
        print(f"cache in {name}: {value:.1f} us, {num_bytes / value / 1e6:.2f} TB/s", flush=True)
        del pool
        torch.cuda.empty_cache()
    bf16_us = found["bfloat16"]["us"]
    ratios = {name: bf16_us / each["us"] for name, each in found.items() if name != "bfloat16"}
    for name, ratio in ratios.items():
        print(f"a cache in {name} is read {ratio:.2f} times as fast", flush=True)
    return found | {"ratios": ratios}


def memory() -> dict[str, Any]:
    """Bytes allocated at most until the model is packed, those of its weights, and of a dense layer."""
    return {scheme: peak(scheme) for scheme in SCHEMES}


def peak(scheme: str) -> dict[str, int]:
    """As the engine loads a model (`Engine.open`), before it takes the KV pool."""
    gc.collect()
    device, config = gpu(0), EngineConfig(quantize=scheme, max_seqs=64, max_len=4096)
    change = OnTheFly.asked(config)
    assert change is not None
    source = find_model(MODEL).on_the_fly(change)
    model, limits = source.config, realise_limits(config, source.config, device)
    specs = attention_specs(model, dtype=BF16, limits=limits)
    products = model.spec.weight_specs(BF16)
    selection = select("triton", device=device, specs=specs, weights=products, dtype=BF16)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    weights = source.load_weights(device.torch_device, BF16)
    loaded = torch.cuda.max_memory_allocated() - before
    Decoder(model, weights, selection, dtype=BF16, limits=limits)
    packed = torch.cuda.max_memory_allocated() - before
    shapes = model.spec.product_shapes()
    layer = sum(n * k * BF16.itemsize for role, (n, k) in shapes.items() if role != "head")
    beyond = packed - weights.num_bytes
    print(
        f"memory, {scheme}: weights {weights.num_bytes / MIB:.0f} MiB, {loaded / MIB:.0f} while loading and "
        f"{packed / MIB:.0f} in all: {beyond / MIB:.0f} beyond them; a dense layer has {layer / MIB:.0f}",
        flush=True,
    )
    return {"weights": weights.num_bytes, "peak_loading": loaded, "peak": packed, "dense_layer": layer}


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "conformance": conformance,
    "cache": cache,
    "memory": memory,
}


if __name__ == "__main__":
    main()
