"""Fused elementwise operations at a model's own sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from backbench.backends.conformance import oracle
from backbench.backends.conformance.operation_check import rotary_table
from backbench.backends.conformance.tolerance import CEILING_ROUNDINGS, deviation, rounding
from backbench.backends.interface import (
    AttentionSpec,
    Backend,
    Device,
    Operations,
    Rotary,
    Rotation,
    SamplingBatch,
)
from backbench.backends.noise import gumbel_noise, noise_key
from backbench.engine.models.config import ModelConfig
from backbench.harness.kernels.problem import Check, Prepared, Problem, rotations

SEED = 20261127
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Operation:
    """One operation: its inputs, the call, the oracle's answer, and the bytes it must move."""

    name: str
    inputs: Callable[[ModelConfig, int, Callable[..., Tensor]], Inputs]
    call: Callable[[Operations, Inputs], Tensor]
    wanted: Callable[[Inputs], Tensor]
    values: Callable[[ModelConfig, int], int]
    """Elements read and written at least once."""


def operation_problems(config: ModelConfig, tokens: tuple[int, ...], dtype: torch.dtype) -> Iterator[Problem]:
    """Each operation at each number of tokens. Arithmetic is not what they cost, so FLOPs are 0."""
    for operation in OPERATIONS:
        for m in tokens:
            yield Problem(
                "operations",
                f"{operation.name} m{m}",
                str(dtype).removeprefix("torch."),
                operation.values(config, m) * dtype.itemsize,
                0,
                partial(prepare, operation, config, m, dtype),
            )


def prepare(
    operation: Operation, config: ModelConfig, m: int, dtype: torch.dtype, backend: Backend, device: Device
) -> Prepared | list[str]:
    """Calls on as many copies of the inputs as make them cold."""
    if backend.operations is None:
        return [f"operations are served by {backend.base}"]
    if reasons := backend.operations.refusals(dtype, device):
        return reasons
    at = device.torch_device
    generator = torch.Generator(device=at).manual_seed(SEED)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=at).to(dtype)

    copies = rotations(device, operation.values(config, m) * dtype.itemsize)
    sets = [operation.inputs(config, m, normal) for _ in range(copies)]
    wanted = operation.wanted(sets[0])
    got = operation.call(backend.operations, sets[0])
    limit = (
        CEILING_ROUNDINGS * rounding(dtype) * float(wanted.abs().max()) if got.is_floating_point() else 0.0
    )
    calls = [partial(operation.call, backend.operations, each) for each in sets]
    return Prepared(calls, Check(deviation(got, wanted).largest, limit), device.torch_device.type == "cuda")


def _norm_inputs(config: ModelConfig, m: int, normal: Callable[..., Tensor]) -> Inputs:
    return {
        "x": normal(m, config.hidden_size),
        "residual": normal(m, config.hidden_size),
        "weight": 1 + 0.1 * normal(config.hidden_size),
    }


def _norm_wanted(given: Inputs) -> Tensor:
    total = given["x"].cpu().double() + given["residual"].cpu().double()
    return oracle.rms_norm(total, given["weight"].cpu(), 1e-6)


def _rotate_inputs(config: ModelConfig, m: int, normal: Callable[..., Tensor]) -> Inputs:
    qkv = normal(m, config.qkv_size)
    spec = AttentionSpec(
        config.q_heads, config.kv_heads, config.head_dim, qkv.dtype, qkv.dtype, 16, config.head_dim**-0.5
    )
    return {
        "qkv": qkv,
        "positions": torch.arange(m, device=qkv.device) % 4096,
        "rotation": Rotation(Rotary(rotary_table(4096, config.head_dim).to(qkv.device), config.head_dim)),
        "spec": spec,
    }


def _rotate(operations: Operations, given: Inputs) -> Tensor:
    return operations.rotate(given["qkv"], given["positions"], given["rotation"], given["spec"])[0]


def _rotate_wanted(given: Inputs) -> Tensor:
    spec: AttentionSpec = given["spec"]
    q = given["qkv"].cpu().view(-1, spec.q_heads + 2 * spec.kv_heads, spec.head_dim)[:, : spec.q_heads]
    table = given["rotation"].rotary.cos_sin.cpu()
    return oracle.rotate_half(q, given["positions"].cpu(), table, spec.head_dim)


def _sample_inputs(config: ModelConfig, m: int, normal: Callable[..., Tensor]) -> Inputs:
    logits = 3 * normal(m, config.vocab_size)
    at = logits.device
    keys = torch.tensor([noise_key(row, 0) for row in range(m)], device=at)
    whole = torch.zeros(m, dtype=torch.int32, device=at)
    ones, zeros = torch.ones(m, device=at), torch.zeros(m, device=at)
    return {"logits": logits, "sampling": SamplingBatch(ones, whole, ones, zeros, keys, all_greedy=False)}


def _sample_wanted(given: Inputs) -> Tensor:
    """By the reference on the CPU; a tie within rounding shows as a wrong draw, and is that rare."""
    noise = gumbel_noise(given["sampling"].noise_key.cpu(), given["logits"].shape[1])
    return (given["logits"].cpu().float() + noise).argmax(-1).double()


OPERATIONS = (
    Operation(
        "add_rms_norm",
        _norm_inputs,
        # The residual may be overwritten, which would change the next call's input, not its time.
        lambda ops, given: ops.add_rms_norm(given["x"], given["residual"].clone(), given["weight"], 1e-6)[0],
        _norm_wanted,
        lambda config, m: 4 * m * config.hidden_size,
    ),
    Operation(
        "gate",
        lambda config, m, normal: {"x": normal(m, 2 * config.ffn_size)},
        lambda ops, given: ops.gate(given["x"]),
        lambda given: oracle.gate(given["x"].cpu()),
        lambda config, m: 3 * m * config.ffn_size,
    ),
    Operation("rotate", _rotate_inputs, _rotate, _rotate_wanted, lambda config, m: 2 * m * config.qkv_size),
    Operation(
        "sample",
        _sample_inputs,
        lambda ops, given: ops.sample(given["logits"], given["sampling"]),
        _sample_wanted,
        lambda config, m: m * config.vocab_size,
    ),
)
