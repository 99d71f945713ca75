"""The cases of `bench kernels` as a pytest-benchmark suite, for a history in CI.

`python -m pytest benchmarks/test_kernels.py --benchmark-autosave` keeps every run under .benchmarks/;
`--benchmark-compare` holds the next one against it. Small shapes, so that a CPU is done in a minute.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from backbench.backends.interface.device import detect
from backbench.backends.registry import availability, load
from backbench.engine.models.checkpoint import find_model
from backbench.harness.kernels.attention import Geometry, attention_problem
from backbench.harness.kernels.linear import linear_problems
from backbench.harness.kernels.operations import operation_problems
from backbench.harness.kernels.problem import Prepared, Problem
from backbench.harness.kernels.shapes import parse_shape

DEVICE = detect()
DTYPE = torch.float32 if DEVICE.vendor == "cpu" else torch.bfloat16
BACKENDS = [name for name, available, _ in availability(DEVICE) if available]
SHAPES = ("1q1s1k", "8q1s512", "1q256", "1q128_4q1s256")


def problems() -> list[Problem]:
    config = find_model("shape:qwen3-0.6b").config
    geometry = Geometry(config.q_heads, config.kv_heads, config.head_dim, 16, DTYPE)
    found = [attention_problem(parse_shape(shape), geometry) for shape in SHAPES]
    found += [each for each in linear_problems(config, (1, 16), DTYPE) if "head" not in each.name]
    return found + list(operation_problems(config, (16,), DTYPE))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("problem", problems(), ids=lambda problem: problem.name.replace(" ", "-"))
def test_kernel(problem: Problem, backend: str, benchmark: Any) -> None:
    prepared = problem.prepare(load(backend), DEVICE)
    if not isinstance(prepared, Prepared):
        pytest.skip("; ".join(prepared))
    assert prepared.check.correct, f"error {prepared.check.error} of {prepared.check.limit}"

    def calls() -> None:
        for call in prepared.calls:
            call()
        if DEVICE.torch_device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info |= {"calls": len(prepared.calls), "bytes": problem.bytes, "flops": problem.flops}
    benchmark.pedantic(calls, rounds=5, warmup_rounds=1)
