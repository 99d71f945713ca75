"""Synthetic runs for the tests of reports/: a small queueing model stands in for the engine.

Nothing here was measured. The model is only realistic in shape: Poisson arrivals, prompts processed in
chunks, a step that costs a fixed part, a part per prompt token and a part per context token.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from backbench.reports.metrics.catalogue import METRIC_SCHEMA
from backbench.reports.metrics.requests import Context
from backbench.reports.record import (
    REQUEST_COLUMNS,
    STEP_COLUMNS,
    TELEMETRY_COLUMNS,
    RunDirectory,
    RunRecord,
    sign,
)

BLOCK, BLOCKS, CHUNK = 16, 4096, 512
MIB = 2**20


@dataclass(frozen=True)
class Machine:
    """What sets the model's pace, and what the record says about where it ran."""

    vendor: str = "cpu"
    name: str = "AMD EPYC 9V74"
    arch: str = "x86_64"
    intercept_s: float = 9e-3
    prefill_s_per_token: float = 4e-5
    slope_s_per_token: float = 3e-7
    capacity_bytes: int | None = None
    idle_w: float | None = None


CPU = Machine()
NVIDIA = Machine("nvidia", "NVIDIA H200", "sm90", 7e-3, 1.5e-5, 1.1e-7, 141 * 1024 * MIB, 118.0)
AMD = Machine("amd", "AMD Instinct MI300X", "gfx942", 8e-3, 1.8e-5, 0.9e-7, 192 * 1024 * MIB, 140.0)


@dataclass
class Sequence:
    id: int
    arrival_s: float
    prompt: int
    output: int
    computed: int = 0
    times: list[int] = field(default_factory=list)


def target_counts(kernels: int, refused: int, spill_bytes: int) -> dict[str, int]:
    """One target's line of the portability summary."""
    spilling = int(spill_bytes > 0)
    return {
        "kernels": kernels,
        "refused": refused,
        "problems": 0,
        "spilling": spilling,
        "most_spill_bytes": spill_bytes,
    }


def simulate(machine: Machine, seed: int, requests: int, rate: float) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Requests and steps of one modelled run; the workload is the same for every `seed`."""
    random = np.random.default_rng(0)
    arrivals = np.cumsum(random.exponential(1 / rate, requests))
    prompts = np.clip(random.lognormal(5.2, 0.9, requests), 8, 1500).astype(int)
    outputs = np.clip(random.lognormal(3.9, 0.7, requests), 4, 400).astype(int)
    random = np.random.default_rng(seed)
    pending = [Sequence(i, *each) for i, each in enumerate(zip(arrivals, prompts, outputs, strict=True))]
    everyone, running, steps, now = list(pending), [], [], 0.0
    while pending or running:
        now = max(now, pending[0].arrival_s) if not running else now
        while pending and pending[0].arrival_s <= now and len(running) < 64:
            running.append(pending.pop(0))
        waiting = sum(each.arrival_s <= now for each in pending)
        decodes = [each for each in running if each.computed >= each.prompt]
        budget, prefill = CHUNK, 0
        for each in running:
            if each not in decodes and budget:
                part = min(budget, each.prompt - each.computed)
                each.computed += part
                prefill, budget = prefill + part, budget - part
        context = sum(each.computed + len(each.times) for each in running)
        seconds = machine.intercept_s + machine.prefill_s_per_token * prefill
        seconds = (seconds + machine.slope_s_per_token * context) * random.lognormal(0, 0.04)
        start, now = now, now + seconds
        for each in running:
            if each.computed >= each.prompt:
                each.times.append(int(now * 1e9))
        used = sum(-(-(each.computed + len(each.times)) // BLOCK) for each in running)
        row = (len(steps), int(start * 1e9), int(now * 1e9), int(seconds * 3e8), len(running))
        row += (prefill + len(decodes), prefill, len(decodes), context, len(running), waiting)
        row += (used, BLOCKS, 0, 0, machine.vendor != "cpu" and not prefill, None)
        steps.append(row)
        running = [each for each in running if len(each.times) < each.output]
    rows = []
    for each in everyone:
        arrival_ns = int(each.arrival_s * 1e9)
        row = (each.id, None, arrival_ns, arrival_ns + 90_000, each.times[0], each.times[-1], each.prompt)
        row += (each.output, each.output, each.times, [1] * each.output, True, None, False)
        row += (None, None, None, None)
        rows.append(row)
    return (
        pd.DataFrame(rows, columns=list(REQUEST_COLUMNS)),
        pd.DataFrame(steps, columns=list(STEP_COLUMNS)),
    )


def telemetry(machine: Machine, steps: pd.DataFrame, seed: int) -> pd.DataFrame:
    """One sample each 100 ms."""
    random = np.random.default_rng(seed)
    end = int(steps["end_ns"].max())
    time_ns = np.arange(0, end, 100_000_000)
    busy = np.interp(time_ns, steps["end_ns"], steps["running"] / 64)
    frame = pd.DataFrame({name: [None] * len(time_ns) for name in TELEMETRY_COLUMNS})
    frame["time_ns"] = time_ns
    if machine.idle_w is None:
        frame["device"] = -1
        frame["host_cpu_percent"] = 100 + 80 * busy + random.normal(0, 3, len(time_ns))
        frame["host_rss_bytes"] = 900 * MIB
        return frame
    frame["device"] = 0
    frame["power_w"] = machine.idle_w + 420 * busy**0.5 + random.normal(0, 6, len(time_ns))
    frame["sm_clock_mhz"] = 1980 - 60 * busy
    frame["memory_clock_mhz"] = 3201.0
    frame["temperature_c"] = 38 + 20 * (1 - np.exp(-time_ns / 1.5e10)) * busy**0.3
    frame["memory_used_bytes"] = 60 * 1024 * MIB
    frame["utilization"] = np.minimum(1.0, 0.2 + busy)
    frame["throttle_reasons"] = 0
    return frame


def summary(values: np.ndarray) -> dict[str, Any]:
    """Count, mean and percentiles with a rough binomial interval; p99 is refused below 368 values."""
    values = np.sort(values)
    out: dict[str, Any] = {"count": len(values), "mean": float(values.mean())}
    for name, share in (("p50", 0.5), ("p90", 0.9), ("p95", 0.95), ("p99", 0.99)):
        if len(values) < {"p95": 72, "p99": 368}.get(name, 1):
            out[name] = {"value": None, "unsupported": f"not supported at this sample size ({len(values)})"}
            continue
        spread = 1.96 * (share * (1 - share) / len(values)) ** 0.5
        low, value, high = np.quantile(values, [max(share - spread, 0), share, min(share + spread, 1)])
        out[name] = {"value": float(value), "low": float(low), "high": float(high)}
    return out


def metrics(requests: pd.DataFrame, steps: pd.DataFrame) -> dict[str, Any]:
    first, last = requests["first_ns"] / 1e9, requests["last_ns"] / 1e9
    intended, sent, tokens = (
        requests["intended_ns"] / 1e9,
        requests["sent_ns"] / 1e9,
        requests["output_tokens"],
    )
    gaps = np.concatenate([np.diff(times) for times in requests["token_ns"]]) / 1e9
    tpot = ((last - first) / (tokens - 1))[tokens > 1].to_numpy()
    duration = float(last.max())
    output, prompt = int(tokens.sum()), int(requests["prompt_tokens"].sum())
    both = {"whole_run": output / duration, "steady_state": 1.14 * output / duration}
    return {
        "schema": METRIC_SCHEMA,
        "context": asdict(Context("open", int(duration * 1e9), False, 64)),
        "ttft_s": summary((first - intended).to_numpy()),
        "ttft_sent_s": summary((first - sent).to_numpy()),
        "tpot_s": summary(tpot),
        "itl_s": summary(gaps),
        "icl_s": summary(gaps),
        "e2e_s": summary((last - intended).to_numpy()),
        "normalized_latency_s": summary(((last - intended) / tokens).to_numpy()),
        "output_tokens_per_s": both,
        "output_tokens_per_s_per_gpu": both,
        "total_tokens_per_s": {"whole_run": (output + prompt) / duration, "steady_state": None},
        "interactivity_tokens_per_s": {
            "p50": float(1 / np.median(tpot)),
            "p10": float(1 / np.quantile(tpot, 0.9)),
        },
        "requests_per_s": len(requests) / duration,
        "goodput_requests_per_s": None,
        "slo": None,
        "counts": {
            "intended": len(requests),
            "sent": len(requests),
            "completed": len(requests),
            "failed": 0,
            "never_sent": 0,
        },
        "prompt_tokens": prompt,
        "output_tokens": output,
        "duration_s": duration,
        "prefix_cache": {"ideal": 0.0, "realised": 0.0},
    }


def memory(machine: Machine, steps: pd.DataFrame) -> dict[str, Any]:
    weights, pool = 12 * MIB, 512 * MIB
    if machine.capacity_bytes:
        weights, pool = 15622 * MIB, 96 * 1024 * MIB
    other = 300 * MIB
    used = int(pool * steps["kv_blocks_used"].max() / BLOCKS)
    on_gpu = machine.capacity_bytes is not None
    return {
        "weights_bytes": weights,
        "kv_pool_bytes": pool,
        "kv_used_peak_bytes": used,
        "other_bytes": other,
        "total_bytes": weights + pool + other,
        "torch_allocated_peak_bytes": weights + pool + other // 2 if on_gpu else None,
        "torch_reserved_peak_bytes": weights + pool + other if on_gpu else None,
        "device_used_peak_minus_idle_bytes": weights + pool + other if on_gpu else None,
        "host_rss_peak_bytes": 912 * MIB,
        "capacity_bytes": machine.capacity_bytes,
    }


def make_record(
    machine: Machine, backend: str, requests: pd.DataFrame, steps: pd.DataFrame, seed: int
) -> RunRecord:
    on_gpu = machine.idle_w is not None
    joules = 0.21 if on_gpu else None
    fit = {
        "intercept_s": machine.intercept_s,
        "slope_s_per_token": machine.slope_s_per_token,
        "intercept_floor_s": machine.intercept_s * 0.55,
        "slope_floor_s_per_token": machine.slope_s_per_token * 0.7,
    }
    return RunRecord(
        run={
            "uuid": f"00000000-0000-4000-8000-{seed:012d}",
            "utc": "2025-01-02T03:04:05Z",
            "command": f"bench run --workload sharegpt --backend {backend}",
            "seed": 0,
            "synthetic": True,
            "status": "complete",
        },
        workload={
            "name": "sharegpt",
            "parameters": {"arrivals": "poisson", "rate": 6.0, "num_requests": len(requests)},
            "content_hash": "9b1c" * 16,
            "notes": ["Synthetic tokens: lengths only, no text."],
            "ideal_prefix_hit_ratio": 0.0,
        },
        model={
            "name": "tiny",
            "revision": None,
            "config_hash": "77aa" * 16,
            "dtype": "float32",
            "quantization": None,
            "num_parameters": 3_214_592,
            "num_layers": 6,
            "hidden_size": 192,
        },
        engine={"block_size": BLOCK, "max_seqs": 64, "max_step_tokens": CHUNK, "prefix_cache": True},
        backend={
            "asked": backend,
            "used": {"attention": backend, "linear": "torch", "norm": "torch", "sampling": "torch"},
            "passed_over": {} if backend == "torch" else {"linear": ["no packed weights for float32"]},
            "tuned": {"attention": "tuned", "linear": "untuned: 2 of 6 shapes, no entry for sm90-132"}
            if backend == "triton"
            else {},
            "portability": {
                "triton": "3.7.1",
                "ran_on": "sm90",
                "targets": {
                    "sm90": target_counts(42, refused=0, spill_bytes=0),
                    "gfx942": target_counts(40, refused=2, spill_bytes=112),
                },
            }
            if backend == "triton"
            else None,
            "kernel_source_hash": "c0ffee" * 10,
            "libraries": {"torch": "2.13.0"},
        },
        system={
            "device": {"vendor": machine.vendor, "arch": machine.arch, "name": machine.name},
            "gpus": [{"name": machine.name, "driver": "580.1", "power_cap_w": 700}] if on_gpu else [],
            "cpu": {"name": "AMD EPYC 9V74", "cores": 2},
            "ram_bytes": 8 * 1024 * MIB,
        },
        software={
            "python": "3.11.9",
            "torch": "2.13.0",
            "triton": "3.7.1",
            "git_sha": "abcdef0",
            "git_dirty": False,
        },
        metrics=metrics(requests, steps),
        memory=memory(machine, steps),
        energy={"joules_per_output_token": joules, "source": "counter" if on_gpu else None, "scope": "board"},
        schedule={
            "offered_requests_per_s": 6.0,
            "achieved_requests_per_s": 5.98,
            "lag_s": {"p50": 9e-5, "p99": 2e-4, "max": 4e-4},
            "index_of_dispersion": 1.04,
            "never_sent": 0,
            "client_saturated": False,
        },
        correctness={
            "reference": "torch",
            "tokens": 2048,
            "max_abs_logprob_diff": 0.0 if backend == "torch" else 3.1e-5,
            "mean_abs_logprob_diff": 0.0 if backend == "torch" else 2.2e-6,
            "top1_agreement": 1.0,
            "tolerance": 1e-3,
            "passed": True,
            "against_itself": backend == "torch",
        },
        roofline={"mbu": 0.41, "mfu": 0.03, "decode_fit": fit},
        warmup={"seconds": 1.8, "requests": 4},
    )


def write_run(
    path: Path,
    machine: Machine = CPU,
    backend: str = "torch",
    *,
    seed: int = 1,
    requests: int = 120,
    rate: float = 6.0,
    **changes: Any,
) -> RunDirectory:
    """A run directory, every backend but torch a little faster; `changes` replace sections of its record."""
    directory = RunDirectory.create(path)
    if backend != "torch":
        machine = replace(machine, slope_s_per_token=0.6 * machine.slope_s_per_token)
        machine = replace(machine, intercept_s=0.85 * machine.intercept_s)
    request_frame, step_frame = simulate(machine, seed, requests, rate)
    record = make_record(machine, backend, request_frame, step_frame, seed)
    directory.write_requests(request_frame)
    directory.write_steps(step_frame)
    directory.write_telemetry(telemetry(machine, step_frame, seed))
    directory.write_record(sign(directory, replace(record, **changes)))
    return directory
