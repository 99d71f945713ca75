"""Linear problems: a model's own weight shapes at some numbers of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from backbench.backends.conformance import oracle
from backbench.backends.conformance.quantized_cases import sure_rows
from backbench.backends.conformance.tolerance import CEILING_ROUNDINGS, deviation, rounding
from backbench.backends.interface import Backend, Device, Scheme, Weight, WeightSpec
from backbench.backends.quantization import name_of, named, quantize
from backbench.engine.models.config import ModelConfig
from backbench.errors import BackendError, HarnessError
from backbench.harness.kernels.problem import Check, Prepared, Problem, rotations

SEED = 20261126
CHECKED_BLOCK = 128
"""Output features that are compared together: no block of scales has more rows."""


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Role -> (output features, input features) of every product of the model."""
    return config.spec.product_shapes()


def linear_problems(
    config: ModelConfig, tokens: tuple[int, ...], dtype: torch.dtype, schemes: Sequence[str] = ("none",)
) -> Iterator[Problem]:
    """Each of the model's distinct weights in each scheme of `--quantize` at each number of tokens.

    Raises HarnessError where a weight does not divide into a scheme's groups.
    """
    for role, (n, k) in weight_shapes(config).items():
        for m in tokens:
            for name in schemes:
                scheme = Scheme() if name == "none" else named(name)
                kept = "" if name == "none" else f" {name}"
                yield Problem(
                    "linear",
                    f"{role.replace('_', ' ')} {n}x{k} m{m}{kept}",
                    str(dtype).removeprefix("torch."),
                    weight_bytes(role, n, k, scheme, dtype) + (m * k + m * n) * dtype.itemsize,
                    2 * m * n * k,
                    partial(prepare, m, WeightSpec(role, n, k, scheme, dtype)),
                    peak_known=scheme.activation is None,
                )


def weight_bytes(role: str, n: int, k: int, scheme: Scheme, dtype: torch.dtype) -> int:
    """What such a weight takes, as itself says it: made of tensors that hold nothing."""
    try:
        return quantize(torch.empty(n, k, dtype=dtype, device="meta"), scheme).num_bytes
    except BackendError as error:
        raise HarnessError(f"{role} cannot be {name_of(scheme)}: {error}") from None


def checked_outputs(n: int) -> list[tuple[int, int]]:
    """Output features that are compared: the first, middle and last ones, in whole blocks of scales."""
    starts = {0, n // 2 // CHECKED_BLOCK * CHECKED_BLOCK, (n - 1) // CHECKED_BLOCK * CHECKED_BLOCK}
    return [(start, min(start + CHECKED_BLOCK, n)) for start in sorted(starts)]


def _copy(weight: Weight) -> Weight:
    scale = None if weight.scale is None else weight.scale.clone()
    return replace(weight, q=weight.q.clone(), scale=scale)


def prepare(m: int, spec: WeightSpec, backend: Backend, device: Device) -> Prepared | list[str]:
    """Calls on as many packed copies of a random weight as make it cold."""
    if backend.linear is None:
        return [f"linear is served by {backend.base}"]
    if reasons := backend.linear.refusals(spec, device):
        return reasons
    linear, at, n, k, dtype = backend.linear, device.torch_device, spec.n, spec.k, spec.dtype
    generator = torch.Generator(device=at).manual_seed(SEED)
    weight = quantize((torch.randn(n, k, generator=generator, device=at) * k**-0.5).to(dtype), spec.scheme)
    x = sure_rows(torch.randn(m, k, generator=generator, device=at).to(dtype), weight)
    copies = rotations(device, weight.num_bytes)
    packed = [linear.pack(_copy(weight), device) for _ in range(copies)]
    out = linear.run(x, packed[0])
    parts = checked_outputs(n)
    host = weight.to(torch.device("cpu"))
    wanted = torch.cat([oracle.quantized_linear(x.cpu(), host.rows(*part), None) for part in parts], 1)
    got = torch.cat([out[:, start:stop] for start, stop in parts], 1)
    limit = CEILING_ROUNDINGS * rounding(dtype) * float(wanted.abs().max())
    calls = [partial(linear.run, x, each) for each in packed]
    return Prepared(calls, Check(deviation(got, wanted).largest, limit), device.torch_device.type == "cuda")
