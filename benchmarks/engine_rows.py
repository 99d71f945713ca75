"""The engine rows: serving speed of the reference engine on one GPU.

    python benchmarks/engine_rows.py --model shape:qwen3-8b --backend triton [--rows nano256,prefill_32x4096]
    python benchmarks/engine_rows.py --model shape:qwen3-0.6b --ablate

Rows, all with random weights, bf16 and one warm-up pass:

    nano256              output tok/s of the catalogue's `nano256`, all 256 requests at once
    tpot_bs<B>_in<N>     (time of batch:BxN+129 - time of batch:BxN+1) / 128, in ms
    prefill_32x4096      prompt tok/s of batch:32x4096+1
    ttft_1x4096          ms from adding one 4096-token prompt to its first token
    host_visible_bs256_in1024   % of the decode steps in which the device waits for the host

`--ablate` repeats two rows with one thing switched off at a time. Any row can be repeated through the
whole harness with `bench run --workload nano256` or `--workload batch:64x1024+129`.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import re
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import triton

from backbench.backends.interface.device import detect
from backbench.engine.config import EngineConfig
from backbench.engine.engine import Engine
from backbench.engine.models.checkpoint import find_model
from backbench.engine.request import SamplingParams, StepStats
from backbench.workloads.catalogue import make
from backbench.workloads.options import WorkloadOptions
from backbench.workloads.request import Request

ROWS = (
    "tpot_bs1_in128",
    "tpot_bs8_in1024",
    "tpot_bs64_in1024",
    "tpot_bs256_in1024",
    "ttft_1x4096",
    "prefill_32x4096",
    "nano256",
    "host_visible_bs256_in1024",
)
ONCE = ("nano256", "host_visible_bs256_in1024")
LIMITS = {"max_seqs": 256, "max_step_tokens": 16384, "max_len": 8192}
"""Requests served at once, tokens in a step, tokens of a request with its answer."""
ABLATED_ROWS = ("tpot_bs1_in128", "tpot_bs256_in1024")
ABLATIONS: dict[str, dict[str, Any]] = {
    "all on": {},
    "overlap off": {"overlap": False},
    "graphs off": {"graphs": False},
    "fused operations off": {"operations": "torch"},
    "skinny GEMM off": {"linear": "torch"},
}


def report_late_compiles(*_: Any, repr: str = "", **__: Any) -> None:
    """Nothing may compile while serving; name what does."""
    print(f"compiled while serving: {repr[:200]}", flush=True)


class Rows(ABC):
    """An engine that serves workloads, and the rows that follow from how long it takes."""

    vocab_size: int
    steps: Sequence[StepStats] = ()
    """Of the workload served last, where the engine tells."""

    def requests(self, workload: str) -> tuple[Request, ...]:
        options = WorkloadOptions(vocab_size=self.vocab_size, max_len=LIMITS["max_len"])
        return make(workload, options).requests

    @abstractmethod
    def seconds(self, workload: str) -> float:
        """Wall time to serve the workload, all requests added at once to an idle, cold engine."""

    def row(self, name: str) -> tuple[float, str]:
        """One row's value and unit."""
        if match := re.fullmatch(r"tpot_bs(\d+)_in(\d+)", name):
            batch = f"batch:{match[1]}x{match[2]}"
            first = self.seconds(f"{batch}+1")
            return (self.seconds(f"{batch}+129") - first) / 128 * 1e3, "ms"
        if name == "ttft_1x4096":
            return self.seconds("batch:1x4096+1") * 1e3, "ms"
        if name == "prefill_32x4096":
            return 32 * 4096 / self.seconds("batch:32x4096+1"), "tok/s"
        if name == "nano256":
            requests = self.requests("nano256")
            return sum(request.output_tokens for request in requests) / self.seconds("nano256"), "tok/s"
        raise SystemExit(f"Unknown row {name!r}; known: {', '.join(ROWS)}.")


class Bench(Rows):
    """Ours, and what was seen of its steps."""

    def __init__(
        self, model: str, backend: str, weights: Any = None, sampled: bool = True, **options: Any
    ) -> None:
        """`sampled`: whether a row samples at a temperature, so that the warm-up must cover that too."""
        overrides = {
            key: options.pop(key)
            for key in ("attention", "linear", "operations", "collectives")
            if key in options
        }
        config = EngineConfig(**LIMITS, **options)
        self.engine = Engine.open(
            find_model(model),
            backend=backend,
            device=detect(),
            dtype=torch.bfloat16,
            config=config,
            overrides=overrides,
            weights=weights,
        )
        triton.knobs.runtime.jit_post_compile_hook = None
        kinds = (0.0, 0.6) if sampled else (0.0,)
        self.warm_up_s = sum(self.engine.warm_up(SamplingParams(temperature=kind)) for kind in kinds)
        triton.knobs.runtime.jit_post_compile_hook = report_late_compiles
        self.vocab_size = self.engine.model_config.vocab_size

    def seconds(self, workload: str) -> float:
        requests = self.requests(workload)
        self.engine.reset_prefix_cache()
        gc.collect()
        gc.freeze()
        start = time.perf_counter()
        for request in requests:
            params = SamplingParams(
                max_tokens=request.output_tokens,
                temperature=request.temperature,
                seed=request.seed,
                ignore_eos=True,
            )
            self.engine.add_request(str(request.id), request.prompt, params)
        while self.engine.has_work:
            self.engine.step()
        elapsed = time.perf_counter() - start
        self.steps = self.engine.take_step_stats()
        gc.unfreeze()
        return elapsed

    def row(self, name: str) -> tuple[float, str]:
        if name == "host_visible_bs256_in1024":
            return device_idle_percent(self, "batch:256x1024+129"), "%"
        return super().row(name)


def device_idle_percent(bench: Bench, workload: str) -> float:
    """Share of the decode-only steps in which the device had nothing to do: the host cost one can see.

    Events enclose every launch in stream order; the time from one step's end to the next one's start is
    the device waiting for the host.
    """
    runner = bench.engine.runner
    launch = runner.launch
    marks: list[tuple[torch.cuda.Event, torch.cuda.Event, bool]] = []

    def marked(plan: Any) -> Any:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step = launch(plan)
        end.record()
        marks.append((start, end, plan.shape.prompts == 0))
        return step

    runner.launch = marked  # type: ignore[method-assign]
    bench.seconds(workload)
    runner.launch = launch  # type: ignore[method-assign]
    torch.cuda.synchronize()
    pairs = [(a, b) for a, b in itertools.pairwise(marks) if a[2] and b[2]][2:-2]
    idle = sum(a[1].elapsed_time(b[0]) for a, b in pairs)
    return 100 * idle / sum(a[0].elapsed_time(b[0]) for a, b in pairs)


def host_share(steps: Sequence[StepStats]) -> tuple[float, float]:
    """(host ms a step, step ms) over the decode-only steps, medians."""
    decodes = [step for step in steps if not step.num_prefill_tokens][2:-2]
    gaps = [b.end_ns - a.end_ns for a, b in itertools.pairwise(decodes)]
    return statistics.median(s.host_ns for s in decodes) / 1e6, statistics.median(gaps) / 1e6


def measure(
    bench: Rows, names: list[str], prefix: str, repeats: int, once: Sequence[str] = ONCE
) -> list[dict[str, Any]]:
    """Every row as the median of its repeats, the spread half their range; those of `once` have one."""
    rows = []
    for name in names:
        seen = [bench.row(name) for _ in range(1 if name in once else repeats)]
        values = sorted(value for value, _ in seen)
        row = {
            "name": f"{prefix}/{name}",
            "value": round(statistics.median(values), 4),
            "unit": seen[0][1],
            "spread": round((values[-1] - values[0]) / 2, 4),
        }
        rows.append(row)
        note = ""
        if name.startswith("tpot") and bench.steps:
            host_ms, step_ms = host_share(bench.steps)
            note = f"   step {step_ms:.3f} ms, host {host_ms:.3f} ms"
        print(f"{row['name']:48s} {row['value']:12.3f} {row['unit']}{note}", flush=True)
    return rows


def conditions() -> dict[str, str]:
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "method": "random weights, bf16, 64-token KV blocks unless named, steps of at most 16384 tokens, "
        "warmed up; median of the repeats, spread = half their range",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="shape:qwen3-8b")
    parser.add_argument("--backend", default="triton")
    parser.add_argument("--attention", help="other attention, as in `bench run`: prefill=flash,decode=triton")
    parser.add_argument("--block-size", type=int, help="tokens in a KV block, default the engine's (64)")
    parser.add_argument("--quantize", help="weights, as in `bench run`: fp8")
    parser.add_argument("--quantize-head", action="store_true", default=None)
    parser.add_argument("--sparsity", help="zeros among them: 2:4")
    parser.add_argument("--kv-dtype", help="of the KV cache: fp8 or int8")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--ablate", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    shape = options.model.removeprefix("shape:")
    rows: list[dict[str, Any]] = []
    names = ("attention", "block_size", "quantize", "quantize_head", "sparsity", "kv_dtype")
    given = {name: getattr(options, name) for name in names}
    extra = {key: value for key, value in given.items() if value is not None}
    label = "+".join([options.backend, *(f"{key}:{value}" for key, value in extra.items())])
    weights = None
    for name, changes in (ABLATIONS if options.ablate else {"all on": {}}).items():
        names = list(ABLATED_ROWS) if options.ablate else options.rows.split(",")
        bench = Bench(options.model, options.backend, weights, "nano256" in names, **extra, **changes)
        weights = bench.engine.weights
        print(f"{name}: {bench.engine.runner.num_graphs} graphs, warm-up {bench.warm_up_s:.1f} s", flush=True)
        prefix = f"ablation/{shape}/{name.replace(' ', '_')}" if options.ablate else f"engine/{shape}/{label}"
        rows += measure(bench, names, prefix, options.repeats)
        if options.out:
            options.out.write_text(json.dumps({"conditions": conditions(), "rows": rows}, indent=1))
        del bench
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
