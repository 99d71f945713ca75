"""One model over two GPUs of one host, beside one GPU.

    python benchmarks/tensor_parallel.py --out tensor-parallel.json
    python benchmarks/tensor_parallel.py --parts identity,all_reduce:triton,conformance
    python benchmarks/tensor_parallel.py --parts rows:qwen3-32b:2,rows:qwen3-32b:1
    python benchmarks/tensor_parallel.py --parts rows:qwen3-8b:2 --rows tpot_bs1_in128 --collectives torch

Parts, each a process of its own with a time limit, so that one which hangs costs no other:

    identity              fp32 tokens over two GPUs are those of one, captured and eager
    conformance           both collectives put through their cases
    all_reduce:BACKEND    8 KiB to 8 MiB in a graph: the backend's sum, torch's one-shot and two-shot
    programs              the same, of the one-shot kernel with other numbers of programs
    rows:MODEL:N          rows of engine_rows.py over N GPUs
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import triton

from backbench.backends.interface.device import detect
from backbench.backends.torch.collectives import TorchCommunicator
from backbench.backends.triton.collectives import OneShotCommunicator
from backbench.engine.config import EngineConfig
from backbench.engine.engine import Engine
from backbench.engine.models.checkpoint import find_model
from backbench.engine.parallel.team import Member, Team
from backbench.engine.request import SamplingParams
from backbench.harness.kernels.collectives import (
    Sizes,
    conform_on,
    contender_of,
    measure_all_reduce,
    measured,
    nothing,
)
from backbench.harness.kernels.measure import KernelResult

WORLD = 2
PARTS = {
    "all_reduce:triton": 60,
    "conformance": 90,
    "identity": 120,
    "rows:qwen3-8b:2": 150,
    "rows:qwen3-8b:1": 150,
    "programs": 60,
    "all_reduce:torch": 60,
    "rows:qwen3-32b:2": 200,
    "rows:qwen3-32b:1": 240,
}
"""Part -> seconds it may take; what is worth most comes first."""
MEMORY = {("qwen3-32b", 1): 0.97}
"""Share of a GPU's memory for the engine, where its usual share leaves little beside the weights."""
ROWS = {
    "qwen3-8b": "tpot_bs1_in128,tpot_bs256_in1024,nano256,host_visible_bs256_in1024",
    "qwen3-32b": "tpot_bs1_in128,nano256",
}
"""What of a model is measured."""
HIDDEN = 4096
BATCHES = (1, 4, 16, 32, 64, 128, 256, 512, 1024)
"""Rows of bf16 hidden states: 8, 32, 128, 256, 512 KiB, 1, 2, 4 and 8 MiB."""
SIZES = Sizes(BATCHES, HIDDEN, torch.bfloat16)


def identity(_: argparse.Namespace) -> dict[str, Any]:
    """Greedy and sampled tokens of a small shape in fp32, over one and two GPUs."""
    found: dict[str, Any] = {}
    source, team = find_model("shape:qwen3-0.6b"), Team(WORLD, detect())
    limits = {"max_seqs": 8, "max_step_tokens": 512, "max_len": 512, "num_blocks": 128}
    try:
        for graphs in (True, False):
            answers = []
            for tp in (1, WORLD):
                config = EngineConfig(**limits, graphs=graphs, tp=tp)
                with Engine.open(
                    source,
                    backend="triton",
                    device=detect(),
                    dtype=torch.float32,
                    config=config,
                    team=team,
                ) as engine:
                    answers.append(_tokens(engine))
            found["captured" if graphs else "eager"] = _compared(*answers)
    finally:
        team.close()
    return found


def _tokens(engine: Engine) -> list[tuple[list[int], list[float]]]:
    prompts = [
        [(31 * i + 977 * salt) % 150_000 for i in range(length)]
        for salt, length in enumerate((1, 7, 64, 200))
    ]
    kinds = (
        SamplingParams(max_tokens=32, logprobs=True),
        SamplingParams(max_tokens=32, temperature=0.8, logprobs=True),
    )
    done = []
    for params in kinds:
        engine.warm_up(params)
        done += engine.generate(prompts, params)
    return [(each.token_ids, each.logprobs) for each in done]


def _compared(one: Any, several: Any) -> dict[str, Any]:
    differing, furthest, tokens = [], 0.0, 0
    for index, ((ids, logprobs), (own, own_logprobs)) in enumerate(zip(one, several, strict=True)):
        same = next((i for i, (a, b) in enumerate(zip(ids, own, strict=True)) if a != b), len(ids))
        tokens += same
        pairs = list(zip(logprobs, own_logprobs, strict=True))[:same]
        furthest = max([furthest, *(abs(a - b) for a, b in pairs)])
        if same < len(ids):
            differing.append(
                {"sequence": index, "at": same, "logprobs": [logprobs[same], own_logprobs[same]]}
            )
    return {
        "identical": not differing,
        "tokens_alike": tokens,
        "largest_logprob_difference": furthest,
        "differing": differing,
    }


def conformance(_: argparse.Namespace) -> dict[str, Any]:
    """What is wrong with either's collectives, on any GPU."""
    team = Team(WORLD, detect())
    found: dict[str, Any] = {}
    try:
        for name in ("torch", "triton"):
            dtypes = (torch.bfloat16, torch.float16, torch.float32)
            ranks = team.call(conform_on, name, "full", dtypes)
            rows = [row for rows in ranks for row in rows]
            found[name] = {
                "cases": len(rows),
                "passed": sum(row.status == "pass" for row in rows),
                "other": [
                    f"{row.status} {row.dtype} {row.case}: {row.detail}"
                    for row in rows
                    if row.status != "pass"
                ],
            }
    finally:
        team.close()
    return found


def all_reduce(backend: str) -> list[dict[str, Any]]:
    """Microseconds of one call."""
    return in_microseconds(measure_all_reduce([backend], SIZES, WORLD, detect()))


def programs(_: argparse.Namespace) -> list[dict[str, Any]]:
    """Microseconds of one call of the one-shot kernel."""
    import tensor_parallel  # by a name that the other process can import

    team = Team(WORLD, detect())
    try:
        return in_microseconds(team.call(tensor_parallel.measure_programs)[0])
    finally:
        team.close()


def measure_programs(member: Member) -> list[KernelResult]:
    """Every number of programs at every size."""
    results = []
    for count in (8, 16, 32, 64, 128):
        communicator = OneShotCommunicator(member.peers, TorchCommunicator(member.peers), count)
        contender = contender_of(f"{count} programs", communicator)
        for rows in SIZES.rows:
            empty = nothing(member, contender.name, SIZES, rows)
            results.append(measured(member, contender, rows * HIDDEN, SIZES.dtype, empty))
    return results


def in_microseconds(results: list[KernelResult]) -> list[dict[str, Any]]:
    """What is kept of results."""
    rows = []
    for result in results:
        flat = result.to_json()
        row = {
            name: flat[name] for name in ("problem", "backend", "mode", "error", "limit", "correct", "note")
        }
        for name in ("median", "low", "high"):
            seconds = flat[f"{name}_s"]
            row[f"{name}_us"] = None if seconds is None else round(seconds * 1e6, 2)
        rows.append(row)
        print(f"{row['problem']:28s} {row['backend']:26s} {row['median_us']} us {row['note']}", flush=True)
    return rows


def engine_rows(model: str, tp: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """As engine_rows.py's, over `tp` GPUs."""
    from engine_rows import Bench, measure

    names = (options.rows or ROWS[model]).split(",")
    given = {} if tp == 1 else {"tp": tp}
    if options.collectives and tp > 1:
        given["collectives"] = options.collectives
    if share := options.kv_memory_fraction or MEMORY.get((model, tp)):
        given["kv_memory_fraction"] = share
    start = time.perf_counter()
    bench = Bench(f"shape:{model}", "triton", None, "nano256" in names, **given)
    opened = time.perf_counter() - start
    engine = bench.engine
    print(f"{model} tp{tp}: opened and warm in {opened:.0f} s, {engine.runner.num_graphs} graphs", flush=True)
    rows = measure(bench, names, f"engine/{model}/tp{tp}", options.repeats)
    facts = {
        "num_blocks": engine.limits.num_blocks,
        "opened_s": round(opened, 1),
        "devices": engine.memory_by_device(),
        "ways": [way._asdict() for way in engine.decoder.communicator.ways()],
    }
    engine.close()
    return [facts, *rows]


def run_part(name: str, options: argparse.Namespace) -> Any:
    if name.startswith("rows:"):
        _, model, tp = name.split(":")
        return engine_rows(model, int(tp), options)
    if name.startswith("all_reduce:"):
        return all_reduce(name.partition(":")[2])
    return {"identity": identity, "conformance": conformance, "programs": programs}[name](options)


def in_a_process(name: str, arguments: list[str], limit_s: float) -> Any:
    """The part's result, or why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "part.json"
        command = [sys.executable, __file__, *arguments, "--part", name, "--out", str(out)]
        try:
            done = subprocess.run(command, timeout=limit_s)
        except subprocess.TimeoutExpired:
            return {"failed": f"took longer than {limit_s:.0f} s"}
        return json.loads(out.read_text()) if out.exists() else {"failed": f"exit code {done.returncode}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--part", help="this one, in this process")
    parser.add_argument("--rows", help="of engine_rows.py, instead of the model's own")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--collectives", help="backend of the sums: torch or triton")
    parser.add_argument("--kv-memory-fraction", type=float)
    parser.add_argument("--limit-s", type=float, help="of each part, instead of its own")
    parser.add_argument("--total-s", type=float, default=480.0, help="of all parts; the rest is not run")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.part:
        options.out.write_text(json.dumps(run_part(options.part, options)))
        return
    passed_on = [f"--repeats={options.repeats}"]
    for name in ("rows", "collectives", "kv_memory_fraction"):
        if (value := getattr(options, name)) is not None:
            passed_on.append(f"--{name.replace('_', '-')}={value}")
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    record: dict[str, Any] = {
        "conditions": {"devices": devices, "torch": torch.__version__, "triton": triton.__version__},
        "parts": {},
    }
    begin = time.perf_counter()
    for name in options.parts.split(","):
        start = time.perf_counter()
        left = options.total_s - (start - begin)
        limit = min(options.limit_s or PARTS.get(name, 180), left)
        found = in_a_process(name, passed_on, limit) if left > 20 else {"failed": "no time was left"}
        record["parts"][name] = found
        if (
            name.startswith("rows:")
            and not name.endswith(":1")
            and "failed" in found
            and not options.collectives
        ):
            # What the engine does without the kernel is worth knowing, too.
            record["parts"][f"{name}, NCCL alone"] = found = in_a_process(
                name, [*passed_on, "--collectives=torch"], limit
            )
        took = time.perf_counter() - start
        print(f"== {name} ({took:.0f} s): {json.dumps(found)[:3000]}", flush=True)
        if options.out:
            options.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
