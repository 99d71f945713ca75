"""How much faster than transformers the engine serves real traffic on a CPU, side by side in one process.

    python benchmarks/cpu.py [--num-requests 64] [--threads 2]

The first 64 ShareGPT requests on the bundled model `tiny`, fp32, greedy, every output length fixed:
once through the engine with the torch backend, once through transformers' padded `generate` (one batch,
all at once, until the longest is done), once through transformers' own continuous batching where it runs.
Absolute times depend on the machine; the ratios are the result.
"""

from __future__ import annotations

import argparse
import time

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from backbench.backends.interface.device import detect
from backbench.engine.config import EngineConfig
from backbench.engine.engine import Engine
from backbench.engine.models.checkpoint import find_model
from backbench.engine.request import SamplingParams
from backbench.workloads.catalogue import WorkloadOptions, make
from backbench.workloads.request import Workload


def engine_tokens_per_s(workload: Workload, backend: str) -> float:
    """Output tokens per second of the engine, all requests added at once."""
    engine = Engine.open(
        find_model("tiny"), backend=backend, device=detect(), config=EngineConfig(max_seqs=64)
    )
    engine.warm_up()
    for request in workload.requests:
        params = SamplingParams(max_tokens=request.output_tokens, ignore_eos=True)
        engine.add_request(str(request.id), request.prompt, params)
    start, tokens = time.perf_counter(), 0
    while engine.has_work:
        tokens += len(engine.step())
    return tokens / (time.perf_counter() - start)


def padded_tokens_per_s(workload: Workload) -> float:
    """Wanted output tokens per second of one padded batch; what runs past a request's length is waste."""
    model = AutoModelForCausalLM.from_pretrained(find_model("tiny").path, dtype=torch.float32)
    longest = max(len(request.prompt) for request in workload.requests)
    ids = torch.zeros(len(workload.requests), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, request in enumerate(workload.requests):
        ids[row, longest - len(request.prompt) :] = torch.tensor(request.prompt)
        mask[row, longest - len(request.prompt) :] = 1
    steps = max(request.output_tokens for request in workload.requests)
    start = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=steps, min_new_tokens=steps, do_sample=False
        )
    return sum(request.output_tokens for request in workload.requests) / (time.perf_counter() - start)


def continuous_tokens_per_s(workload: Workload, patience_s: float) -> float:
    """Output tokens per second of transformers' continuous batching until it is done or patience ends.

    Cut short, its rate is that of full batches, without the slow tail that the engine's rate includes.
    """
    model = AutoModelForCausalLM.from_pretrained(
        find_model("tiny").path, dtype=torch.float32, attn_implementation="sdpa"
    )
    config = GenerationConfig(max_new_tokens=1, do_sample=False, eos_token_id=-1)
    start, seen, unfinished = time.perf_counter(), dict[str, int](), len(workload.requests)
    with model.continuous_batching_context_manager(generation_config=config) as manager:
        for request in workload.requests:
            manager.add_request(list(request.prompt), max_new_tokens=request.output_tokens, streaming=True)
        while unfinished and time.perf_counter() - start < patience_s:
            result = manager.get_result(timeout=5)
            if result is None:
                continue
            if result.error:
                raise RuntimeError(f"transformers' continuous batching failed: {result.error}")
            seen[result.request_id] = len(result.generated_tokens)
            unfinished -= result.is_finished()
        elapsed_s = time.perf_counter() - start
        manager.stop(block=False, hard_stop=True)
    return sum(seen.values()) / elapsed_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-requests", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--skip-padded", action="store_true")
    parser.add_argument("--patience-s", type=float, default=600, help="for continuous batching")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    source = find_model("tiny")
    workload = make(
        "sharegpt",
        WorkloadOptions(
            num_requests=options.num_requests,
            vocab_size=source.config.vocab_size,
            max_len=source.config.max_len,
        ),
    )
    outputs = sum(request.output_tokens for request in workload.requests)
    print(f"{len(workload.requests)} requests, {outputs} output tokens, {options.threads} threads")
    ours = engine_tokens_per_s(workload, options.backend)
    print(f"engine, {options.backend} backend          {ours:10.1f} output tok/s")
    if not options.skip_padded:
        padded = padded_tokens_per_s(workload)
        print(f"transformers padded generate   {padded:10.1f} output tok/s   engine {ours / padded:.2f}x")
    try:
        continuous = continuous_tokens_per_s(workload, options.patience_s)
    except Exception as error:
        print(f"transformers continuous batching does not run here: {error}")
    else:
        ratio = f"engine {ours / continuous:.2f}x"
        print(f"transformers continuous batching {continuous:8.1f} output tok/s   {ratio}")


if __name__ == "__main__":
    main()
