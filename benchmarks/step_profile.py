"""What a decode step of the engine spends its time on, and up to how many rows launches should overlap.

    python benchmarks/step_profile.py --model shape:qwen3-8b --most-rows 64,1000000000

For each limit of `backends.triton.launch.MOST_OVERLAPPED_ROWS` the rows that many sequences decide are
measured; then one decode step of 256 sequences is listed kernel by kernel, and the library's products of
96 to 256 rows are timed through each of torch's ways to call it. Written to decide by; writes no row.
"""

from __future__ import annotations

import argparse
import gc
from typing import Any

import torch
from engine_rows import Bench
from graph_timing import graph_time_us
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from backends.triton import launch
from engine.request import SamplingParams

ROWS = ("tpot_bs64_in1024", "tpot_bs256_in1024", "nano256")


def profile_decode(bench: Bench, sequences: int = 256, steps: int = 3) -> None:
    """Print the kernels of a decode step by their time on the device."""
    engine = bench.engine
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    for request in bench.requests(f"batch:{sequences}x256+40"):
        engine.add_request(str(request.id), request.prompt, params)
    while engine.has_work:
        engine.step()
        if engine.take_step_stats()[-1].graph:
            break
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(steps):
            engine.step()
        torch.cuda.synchronize()
    kernels = sorted(seen.key_averages(), key=lambda event: -event.self_device_time_total)
    for event in kernels[:20]:
        print(
            f"{event.self_device_time_total / steps:9.1f} us  {event.count / steps:6.1f} x  {event.key[:90]}"
        )
    while engine.has_work:
        engine.step()
    engine.take_step_stats()


def library_products(bench: Bench) -> None:
    """Time F.linear through each library torch may call, and addmm, for the model's shapes."""
    layer = bench.engine.weights.layers[0]
    weights = [layer.qkv.q, layer.output.q, layer.gate_up.q, layer.down.q, bench.engine.weights.lm_head.q]
    for weight in weights:
        n, k = weight.shape
        copies = [weight] if weight.nbytes > 2**29 else [weight.clone() for _ in range(3)]
        zero = torch.zeros(n, device=weight.device, dtype=weight.dtype)
        for m in (96, 128, 192, 256):
            x = torch.randn(m, k, device=weight.device, dtype=weight.dtype)
            line = []
            for name, library, call in (
                ("cublas", "cublas", lambda w, x=x: functional.linear(x, w)),
                ("cublaslt", "cublaslt", lambda w, x=x: functional.linear(x, w)),
                ("addmm", "cublaslt", lambda w, x=x, zero=zero: torch.addmm(zero, x, w.t())),
            ):
                torch.backends.cuda.preferred_blas_library(library)
                calls: list[Any] = [lambda w=w, call=call: call(w) for w in copies]
                line.append(f"{name} {graph_time_us(calls)[0]:.1f}")
            print(f"{n} x {k}, M = {m}: {', '.join(line)} us", flush=True)
    torch.backends.cuda.preferred_blas_library("cublas")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="shape:qwen3-8b")
    parser.add_argument("--most-rows", default=f"64,{launch.MOST_OVERLAPPED_ROWS}")
    options = parser.parse_args()
    weights = None
    for limit in map(int, options.most_rows.split(",")):
        launch.MOST_OVERLAPPED_ROWS = limit
        bench = Bench(options.model, "triton", weights)
        weights = bench.engine.weights
        for row in ROWS:
            value, unit = bench.row(row)
            print(f"overlap up to {limit} rows: {row} {value:.3f} {unit}", flush=True)
        profile_decode(bench)
        if limit == int(options.most_rows.split(",")[-1]):
            library_products(bench)
        del bench
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
