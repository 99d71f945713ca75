"""Weights in every scheme, and rows whose rounding is beyond doubt: what a linear is checked with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from backbench.backends.interface import Scheme, Weight
from backbench.backends.quantization import ACTIVATIONS, SCHEMES, quantize, rounded_rows

STATIC_SCALE = 2.0**-5
"""`Weight.input_scale` of integers and fp8: the rows drawn here reach about four standard deviations."""
NVFP4_SCALE = 2.0**-9
"""The same of NVFP4, beside scales of groups that are e4m3."""
SURE = 1e-3
"""A row's number is rounded alike by every right kernel where a change by this share does not alter its code:
scales are computed with few roundings, of 2^-24 each, so that only numbers next to a tie depend on them."""


@dataclass(frozen=True)
class Kept:
    """One way to keep a weight."""

    scheme: Scheme
    ordered: bool = False
    """Its columns stand in an order of their own, as act-order leaves them."""


KEPT: Mapping[str, Kept] = {
    **{name: Kept(scheme) for name, scheme in SCHEMES.items()},
    "int4-g128 zero points": Kept(Scheme("int4", group=128, zero_point=True)),
    "int4-g128 act-order": Kept(Scheme("int4", group=128), ordered=True),
    "int8-g128": Kept(Scheme("int8", group=128)),
    "int8-g128 zero points": Kept(Scheme("int8", group=128, zero_point=True)),
    "int8-w8a8 static": Kept(Scheme("int8", activation="int8-tensor")),
    "fp8 rows as they are": Kept(Scheme("fp8")),
    "fp8 static": Kept(Scheme("fp8", activation="fp8-tensor")),
    "mxfp8": Kept(Scheme("fp8", group=32, scale="e8m0", activation="mxfp8")),
    "nvfp4 rows too": Kept(replace(SCHEMES["nvfp4"], activation="nvfp4")),
    "mxfp4 rows too": Kept(replace(SCHEMES["mxfp4"], activation="mxfp4")),
    "2:4": Kept(Scheme(sparsity="2:4")),
    "int4-g128 2:4": Kept(replace(SCHEMES["int4-g128"], sparsity="2:4")),
}
"""Name -> how: what `--quantize` writes, and what checkpoints come in besides."""


def draw_weight(kept: Kept, n: int, k: int, dtype: torch.dtype, generator: torch.Generator) -> Weight:
    """A random weight [n, k] kept so, its float scales in `dtype`.

    Neighbouring rows and groups differ in size up to 4 times, and the middle is not 0, so that no scale and
    no zero point can be taken for another.
    """
    scheme = kept.scheme
    dense = torch.randn(n, k, generator=generator) * k**-0.5
    dense = dense + (0.5 * k**-0.5 if scheme.zero_point else 0.0)
    dense *= 2 ** (2 * torch.rand(n, 1, generator=generator))
    dense *= 2 ** (2 * torch.rand(1, -(-k // 16), generator=generator)).repeat_interleave(16, 1)[:, :k]
    if scheme.sparsity == "2:4":
        places = torch.rand(n * k // 4, 4, generator=generator).argsort(1)[:, :2]
        dense = dense.view(-1, 4).scatter(1, places, 0.0).view(n, k)
    weight = quantize(dense.to(dtype), replace(scheme, activation=None))
    weight = replace(weight, scheme=scheme)
    if kept.ordered:
        weight.order = torch.randperm(k, generator=generator)
    if scheme.activation in ("int8-tensor", "fp8-tensor", "nvfp4"):
        weight.input_scale = torch.tensor([NVFP4_SCALE if scheme.activation == "nvfp4" else STATIC_SCALE])
    return weight


def sure_rows(x: Tensor, weight: Weight) -> Tensor:
    """x [M, K] in its dtype, with 0 in place of every number that is rounded one way or the other by a hair.

    The largest number of each group, which decides the scale, is made positive and stays: int8's range has
    one number more below 0 than above.
    """
    activation = weight.scheme.activation
    if activation is None:
        return x
    if weight.order is not None:
        raise ValueError("rows for ordered columns are not drawn here")
    _, size, scaling = ACTIVATIONS[activation]
    groups = x.float().unflatten(1, (-1, size or x.shape[1]))
    top = groups.abs().amax(-1, keepdim=True)
    if scaling == "static":
        top = torch.full_like(top, torch.inf)
    groups = torch.where(groups.abs() == top, groups.abs(), groups)

    def codes(rows: Tensor) -> Tensor:
        rows = torch.where(groups.abs() == top, groups, rows).clamp(-top, top)
        return rounded_rows(rows.flatten(1), activation, weight.input_scale)[0].float().view_as(groups)

    sure = codes(groups * (1 - SURE)) == codes(groups * (1 + SURE))
    return torch.where(sure, groups, 0.0).flatten(1).to(x.dtype)
