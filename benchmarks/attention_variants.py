"""The launches that `benchmarks/attention.py --scan` tries, and the cases `--check` runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from backbench.backends.conformance.attention_cases import AttentionCase, make_case
from backbench.backends.conformance.attention_run import filled_cache, run_step, set_up
from backbench.backends.conformance.tolerance import Deviation, complaint, deviation, limit
from backbench.backends.interface import AttentionSpec, Device
from backbench.backends.interface.device import gpu
from backbench.backends.torch.attention import TorchAttention
from backbench.backends.triton.attention import TritonAttention, TritonRunner
from backbench.backends.triton.configs import decode_launches, prefill_launches
from backbench.backends.tuning.search import describe


@dataclass(frozen=True)
class Variant:
    """One configuration of one kernel."""

    name: str
    block_size: int
    decode: dict[str, Any] = field(default_factory=dict)
    prefill: dict[str, Any] = field(default_factory=dict)

    def runner(self, spec: AttentionSpec, device: Device) -> TritonRunner:
        return TritonRunner(spec, device, self.decode, self.prefill)


def variant(kind: str, block_size: int, launch: dict[str, Any]) -> Variant:
    """The launch, named by its settings."""
    return Variant(f"block{block_size} {describe(launch)}", block_size, **{kind: launch})


def variants(kind: str, spec: AttentionSpec, device: Device) -> tuple[Variant, ...]:
    """The launches that `bench tune` would try for the spec's block size."""
    tried = decode_launches() if kind == "decode" else prefill_launches(device, spec)
    return tuple(variant(kind, spec.block_size, launch) for launch in tried)


SHAPES = ("decode", "long", "prefill", "prefix", "mixed")
GEOMETRIES: tuple[dict[str, Any], ...] = (
    {"head_dim": 128},
    {"head_dim": 128, "block_size": 64},
    {"head_dim": 128, "block_size": 128, "window": 33},
    {"head_dim": 32, "group": 7},
    {"head_dim": 80, "group": 16, "softcap": 20.0},
    {"head_dim": 96, "group": 1, "block_size": 32, "window": 20},
    {"head_dim": 256, "group": 8},
    {"head_dim": 64, "kv_dtype": torch.float8_e4m3fn},
    {"head_dim": 64, "kv_dtype": torch.float8_e4m3fn, "block_size": 64},
    {"head_dim": 128, "kv_dtype": torch.int8},
    {"head_dim": 64, "kv_dtype": torch.int8, "block_size": 64},
    {"head_dim": 80, "block_size": 64},
    {"head_dim": 96, "group": 7, "block_size": 128},
    {"head_dim": 128, "pad": 3, "kind": "padding"},
)


def small_cases() -> list[AttentionCase]:
    """Every shape at every geometry, the dtypes in turn, and fp32 everywhere for two of them."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    pairs = [(shape, geometry) for geometry in GEOMETRIES for shape in SHAPES]
    cases = [
        make_case(shape, torch.bfloat16 if "kv_dtype" in geometry else dtypes[i % 3], **geometry)
        for i, (shape, geometry) in enumerate(pairs)
    ]
    cases += [make_case(shape, torch.float32, head_dim=d) for d in (128, 256) for shape in SHAPES]
    return [*cases, make_case("wide decode", torch.bfloat16), make_case("long decode 5000", torch.bfloat16)]


def run_case(case: AttentionCase) -> str:
    """What is wrong with the Triton backend on GPU 0 in this case; empty when nothing."""
    try:
        device, setup = gpu(0), set_up(case)
        outputs = []
        for attention in (TritonAttention(), TorchAttention()):
            if attention.refusals(case.spec, device):
                continue
            runner = attention.open(case.spec, device)
            cache = filled_cache(runner, setup, device.torch_device)
            outputs.append(run_step(runner, cache, setup, device.torch_device))
        actual = deviation(outputs[0], setup.expected)
        unit = Deviation(float("inf"), float("inf"))
        reference = deviation(outputs[1], setup.expected) if len(outputs) > 1 else unit
        problem = complaint(actual, limit(reference, setup.expected, case.spec.dtype))
    except Exception as error:
        problem = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
    return f"{case.name} {case.spec.dtype}: {problem}" if problem else ""
