"""What a decode step of the engine spends its time on, kernel by kernel.

    python benchmarks/step_profile.py --model shape:qwen3-8b --sequences 256

Written to decide by; writes no row.
"""

from __future__ import annotations

import argparse

import torch
from engine_rows import Bench
from torch.profiler import ProfilerActivity, profile

from backbench.engine.request import SamplingParams


def profile_decode(bench: Bench, sequences: int, steps: int = 3) -> None:
    """Print the kernels of a decode step by their time on the device."""
    engine = bench.engine
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    for request in bench.requests(f"batch:{sequences}x256+40"):
        engine.add_request(str(request.id), request.prompt, params)
    while engine.has_work:
        engine.step()
        if not engine.take_step_stats()[-1].num_prefill_tokens:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="shape:qwen3-8b")
    parser.add_argument("--sequences", type=int, default=256)
    options = parser.parse_args()
    profile_decode(Bench(options.model, "triton", sampled=False), options.sequences)


if __name__ == "__main__":
    main()
