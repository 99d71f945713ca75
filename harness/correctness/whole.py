"""The reference of a model that is divided among devices: the whole of it, on the first one.

What each device holds is a part that the loading cut out. A reference on those parts would be wrong alike,
so the model is loaded once more, undivided, when nothing of the engine is needed any more. One thing it
takes over from them: where a scheme gives a row one scale, each device rounds its own columns of the row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from backbench.backends.interface import Device, Linear, PackedWeight, Weight
from backbench.backends.quantization import ACTIVATIONS, meant_rows
from backbench.engine.models.decoder import Decoder
from backbench.engine.models.weights import Weights
from backbench.harness.correctness.reference import (
    PlainLinear,
    WideLinear,
    torch_decoder,
    wide_decoder,
    wider,
)

if TYPE_CHECKING:
    from backbench.engine.engine import Engine
    from backbench.engine.models.checkpoint import ModelSource
    from backbench.engine.models.layers import ModelSpec

TOO_LARGE = "the whole model does not fit beside a device's part; check it without --tp and --pp"


def whole_weights(engine: Engine, source: ModelSource) -> Weights | None:
    """The undivided weights on the engine's first device; None where they do not fit. Closes the engine."""
    engine.close()
    at = engine.selection.device.torch_device
    if at.type == "cuda":
        torch.cuda.empty_cache()
    try:
        return source.load_weights(at, engine.decoder.dtype)
    except torch.cuda.OutOfMemoryError:
        return None


def whole_decoders(engine: Engine, source: ModelSource, weights: Weights) -> tuple[Decoder, Decoder]:
    """Torch on the undivided weights, in the engine's dtype and in the wider one."""
    device, dtype, max_len = engine.selection.device, engine.decoder.dtype, engine.limits.max_len
    kv_dtype = engine.decoder.kv_dtype if engine.decoder.kv_dtype != dtype else None
    weights.pack(PlainLinear(), device)
    apart = rounded_apart(source.config.spec, weights)
    plain, wide = (ByDevice(each, engine.config.tp, apart) for each in (PlainLinear(), WideLinear()))
    parts = source.config, weights, device
    return (
        torch_decoder(*parts, dtype, max_len, linear=plain, kv_dtype=kv_dtype),
        wide_decoder(*parts, wider(dtype), max_len, kv_dtype, wide),
    )


def rounded_apart(spec: ModelSpec, weights: Weights) -> list[PackedWeight]:
    """The products, packed, whose rows each device rounds for itself: they are divided by columns, and a
    whole row has one scale, which is taken from the row."""
    held = (
        getattr(layer, product.role)
        for described, layer in zip(spec.layers, weights.layers, strict=True)
        for product in described.products
        if product.shard_axis == 1
    )
    return [each for each in held if isinstance(each, PackedWeight) and _of_whole_rows(each)]


def _of_whole_rows(held: PackedWeight) -> bool:
    rounded = held.scheme.activation
    return rounded is not None and ACTIVATIONS[rounded][1:] == (None, "float")


class ByDevice(Linear):
    """A reference's products, where rows of those `apart` are rounded in as many runs of columns as there are
    devices. The weight's scales are those of whole columns on any number of devices."""

    def __init__(self, linear: Linear, world: int, apart: Iterable[PackedWeight]) -> None:
        self.name = f"{linear.name}, by device"
        self._linear = linear
        self._world = world
        self._apart = {id(held) for held in apart}

    def refusals(self, *args: Any, **kwargs: Any) -> list[str]:
        return self._linear.refusals(*args, **kwargs)

    def pack(self, weight: Weight, device: Device) -> Any:
        return self._linear.pack(weight, device)

    def take(self, held: PackedWeight, device: Device) -> Any:
        return self._linear.take(held, device)

    def run(self, x: Tensor, packed: Any, bias: Tensor | None = None) -> Tensor:
        if id(packed) not in self._apart:
            return self._linear.run(x, packed, bias)
        weight = packed.canonical()
        rows = meant_rows(x.reshape(len(x) * self._world, -1), weight).reshape(len(x), -1)
        sure = replace(weight, scheme=replace(weight.scheme, activation=None))
        return self._linear.run(rows, sure, bias).to(x.dtype)
