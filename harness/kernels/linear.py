"""Linear problems: a model's own weight shapes at some numbers of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from backbench.backends.conformance import oracle
from backbench.backends.conformance.tolerance import CEILING_ROUNDINGS, deviation, rounding
from backbench.backends.interface import Backend, Device, Scheme, Weight, WeightSpec
from backbench.engine.models.config import ModelConfig
from backbench.harness.kernels.problem import Check, Prepared, Problem, rotations

SEED = 20261126
CHECKED_OUTPUTS = 256
"""Output features that are compared."""


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Role -> (output features, input features) of every product of the model."""
    return config.spec.product_shapes()


def linear_problems(config: ModelConfig, tokens: tuple[int, ...], dtype: torch.dtype) -> Iterator[Problem]:
    """Each of the model's distinct weights at each number of tokens."""
    for role, (n, k) in weight_shapes(config).items():
        for m in tokens:
            yield Problem(
                "linear",
                f"{role.replace('_', ' ')} {n}x{k} m{m}",
                str(dtype).removeprefix("torch."),
                (n * k + m * k + m * n) * dtype.itemsize,
                2 * m * n * k,
                partial(prepare, m, n, k, dtype),
            )


def prepare(
    m: int, n: int, k: int, dtype: torch.dtype, backend: Backend, device: Device
) -> Prepared | list[str]:
    """Calls on as many packed copies of a random weight as make it cold."""
    if backend.linear is None:
        return [f"linear is served by {backend.base}"]
    if reasons := backend.linear.refusals(WeightSpec("any", n, k, Scheme(), dtype), device):
        return reasons
    linear, at = backend.linear, device.torch_device
    generator = torch.Generator(device=at).manual_seed(SEED)
    weight = (torch.randn(n, k, generator=generator, device=at) * k**-0.5).to(dtype)
    x = torch.randn(m, k, generator=generator, device=at).to(dtype)
    copies = rotations(device, n * k * dtype.itemsize)
    packed = [linear.pack(Weight(Scheme(), weight.clone()), device) for _ in range(copies)]
    some = torch.randperm(n, generator=torch.Generator().manual_seed(SEED))[:CHECKED_OUTPUTS].to(at)
    wanted = oracle.linear(x.cpu(), weight[some].cpu(), None)
    got = linear.run(x, packed[0])[:, some]
    limit = CEILING_ROUNDINGS * rounding(dtype) * float(wanted.abs().max())
    calls = [partial(linear.run, x, each) for each in packed]
    return Prepared(calls, Check(deviation(got, wanted).largest, limit), device.torch_device.type == "cuda")
