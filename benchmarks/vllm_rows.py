"""The rows of engine_rows.py, of vLLM's offline engine: run beside ours on the same warm machine.

    python benchmarks/vllm_rows.py --model shape:qwen3-8b --tp 2 --out vllm-8b.json
    python benchmarks/vllm_rows.py --model shape:qwen3-32b --tp 2 --rows tpot_bs1_in128,nano256

The requests, the limits and the arithmetic are engine_rows.py's. All else is vLLM's default (compiled,
captured CUDA graphs, its choice of attention and sums) but the prefix cache, which is off; ours is emptied
before each row. Weights are vLLM's dummy ones, in bf16; only a config.json is written, nothing is downloaded.

vLLM is no dependency of this project. With an empty cache it compiles and captures for one to three minutes.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

from engine_rows import LIMITS, ROWS, Rows, measure

from backbench.engine.models.checkpoint import find_model
from backbench.engine.models.families import families

SERVED = tuple(row for row in ROWS if not row.startswith("host_visible"))
USUAL = "tpot_bs1_in128,tpot_bs256_in1024,nano256"
WARM_UP_TOKENS = 16
"""Of each request in the pass before the first measured one: every shape is met, little time spent."""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
PACKAGES = ("vllm", "torch", "triton", "transformers")


class VllmRows(Rows):
    """vLLM's engine, open."""

    def __init__(self, folder: Path, **options: Any) -> None:
        """`folder` holds a config.json."""
        from vllm import LLM

        start = time.perf_counter()
        self.llm = LLM(
            model=str(folder),
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            enable_prefix_caching=False,
            max_model_len=LIMITS["max_len"],
            max_num_seqs=LIMITS["max_seqs"],
            max_num_batched_tokens=LIMITS["max_step_tokens"],
            **options,
        )
        self.opened_s = time.perf_counter() - start
        self.config = self.llm.llm_engine.vllm_config
        self.vocab_size = self.config.model_config.get_vocab_size()
        self.most_tokens: int | None = None

    def warm_up(self, names: list[str]) -> None:
        """Every row once, with few tokens."""
        self.most_tokens = WARM_UP_TOKENS
        for name in names:
            self.row(name)
        self.most_tokens = None

    def seconds(self, workload: str) -> float:
        """Wall time to serve the workload, all requests added at once."""
        from vllm import SamplingParams

        requests = self.requests(workload)
        lengths = [min(each.output_tokens, self.most_tokens or each.output_tokens) for each in requests]
        prompts = [{"prompt_token_ids": list(each.prompt)} for each in requests]
        params = [
            SamplingParams(max_tokens=length, temperature=each.temperature, ignore_eos=True, detokenize=False)
            for each, length in zip(requests, lengths, strict=True)
        ]
        gc.collect()
        start = time.perf_counter()
        answers = self.llm.generate(prompts, params, use_tqdm=False)
        elapsed = time.perf_counter() - start
        if [len(answer.outputs[0].token_ids) for answer in answers] != lengths:
            raise RuntimeError(f"vLLM answered {workload} with other numbers of tokens than asked.")
        return elapsed


def write_config(model: str, folder: Path) -> None:
    """A config.json that transformers reads too: it needs the type besides the architecture."""
    config = dict(find_model(model).hf_config)
    types = {family.architecture: family.name for family in families().values()}
    config.setdefault("model_type", types[config["architectures"][0]])
    (folder / "config.json").write_text(json.dumps(config))


def conditions(bench: VllmRows, options: argparse.Namespace) -> dict[str, Any]:
    """Versions, and what vLLM chose."""
    import torch

    compilation = bench.config.compilation_config
    sizes = list(compilation.cudagraph_capture_sizes or ())
    return {
        "devices": [torch.cuda.get_device_name(index) for index in range(options.tp)],
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "flashinfer": importlib.util.find_spec("flashinfer") is not None,
        "sums_fused_with_norms": bool(compilation.pass_config.fuse_allreduce_rms),
        "method": "LLM.generate, dummy weights, bf16, no prefix cache, warmed up; "
        f"median of {options.repeats}, spread = half their range",
        "limits": LIMITS,
        "opened_s": round(bench.opened_s, 1),
        "gpu_memory_utilization": options.gpu_memory_utilization,
        "num_gpu_blocks": bench.config.cache_config.num_gpu_blocks,
        "block_size": bench.config.cache_config.block_size,
        "compilation_mode": str(compilation.mode),
        "cudagraph_mode": str(compilation.cudagraph_mode),
        "cudagraph_capture_sizes": len(sizes),
        "largest_captured": max(sizes, default=0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="shape:qwen3-8b")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--rows", default=USUAL, help="of " + ", ".join(SERVED))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument(
        "--capture-sizes", help="numbers of tokens to capture, instead of vLLM's own: 1,2,4,8"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    names = options.rows.split(",")
    if unknown := set(names) - set(SERVED):
        parser.error(f"unknown rows {', '.join(sorted(unknown))}; known: {', '.join(SERVED)}")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    extra: dict[str, Any] = {}
    if options.capture_sizes:
        sizes = [int(size) for size in options.capture_sizes.split(",")]
        extra["compilation_config"] = {"cudagraph_capture_sizes": sizes}
    with tempfile.TemporaryDirectory() as folder:
        write_config(options.model, Path(folder))
        bench = VllmRows(
            Path(folder),
            tensor_parallel_size=options.tp,
            gpu_memory_utilization=options.gpu_memory_utilization,
            **extra,
        )
        record: dict[str, Any] = {"conditions": conditions(bench, options), "rows": []}
        print(json.dumps(record["conditions"]), flush=True)
        bench.warm_up(names)
        prefix = f"vllm/{options.model.removeprefix('shape:')}/tp{options.tp}"
        for name in names:
            record["rows"] += measure(bench, [name], prefix, options.repeats, once=())
            if options.out:
                options.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
