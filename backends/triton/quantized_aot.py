"""The quantized products' launches compiled without a GPU: every scheme's, as the written rule has them.

A few schemes stand for the rest on every target; the target most runs happen on compiles them all, and what
tuning found there.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from backbench.backends import quantization
from backbench.backends.interface import KernelCase, Scheme
from backbench.backends.interface.weight import PACKED
from backbench.backends.triton import quantized_configs
from backbench.backends.triton.aot_cases import (
    FEED_FORWARD,
    FEW,
    HIDDEN,
    MANY,
    UNITS,
    WEIGHTS,
    WHOLE_RUN,
    imagined,
    on_meta,
)
from backbench.backends.triton.fused_rounding import rounded_gate_launch, rounded_norm_launch
from backbench.backends.triton.launch import Launch, Place, parts
from backbench.backends.triton.linear import scheme_refused
from backbench.backends.triton.quantized import (
    KINDS,
    Rows,
    product_launches,
    rounding_launch,
    writing_launch,
)
from backbench.backends.triton.quantized_configs import BUCKETS, HOPPER, Kernel, Tile, Way
from backbench.backends.triton.quantized_weight import CODES, ROUNDINGS, QuantizedWeight, words_a_span

SCHEMES = {
    **quantization.SCHEMES,
    "int4-g128 zero points": Scheme("int4", group=128, zero_point=True),
}
EVERYWHERE = ("int4-g128 zero points", "int4-g32", "nvfp4", "mxfp4", "int8", "int8-w8a8", "fp8", "fp8-block")
TILED = {
    **{name: scheme for name, scheme in SCHEMES.items() if quantized_configs.tile_takes(scheme, WHOLE_RUN)},
    "fp8 rows as they are": Scheme("fp8"),
    "int8-g128": Scheme("int8", group=128),
}
SCALES = {"float": torch.bfloat16, "e8m0": torch.uint8, "e4m3": quantization.FP8}


def quantized_cases() -> list[KernelCase]:
    """Every case: products of one row, of some, and of many where a kernel takes them, and what is around."""
    found: list[KernelCase] = []
    for name, scheme in SCHEMES.items():
        targets = () if name in EVERYWHERE else (WHOLE_RUN,)
        sizes = (1, 16) if scheme.activation is None else (1, 16, BUCKETS[-1])
        refuses = partial(refusals, scheme)
        for size in sizes:
            if name == "fp8" and size == BUCKETS[-1]:
                continue  # the library's, on some targets
            launch = partial(product, scheme, torch.bfloat16, size, *WEIGHTS[2])
            variant = f"{name} bf16 rows{size}"
            found.append(KernelCase("quantized/product", variant, size > 1, launch, refuses, targets))
        launch = partial(writing, scheme)
        found.append(KernelCase("quantized/write", f"{name} bf16", False, launch, refuses, targets))
    for name in ("int4-g32", "mxfp4", "int8"):
        launch = partial(product, SCHEMES[name], torch.float16, 16, *WEIGHTS[2])
        found.append(
            KernelCase(
                "quantized/product", f"{name} fp16 rows16", True, launch, targets=(WHOLE_RUN, "gfx942")
            )
        )
    for activation in ("fp8-token", "int8-token", "fp8-group128", "fp8-tensor"):
        refuses = partial(refusals, Scheme(activation.partition("-")[0], activation=activation))
        launch = partial(rounding, activation)
        found.append(KernelCase("quantized/round", activation, False, launch, refuses))
    for rows, targets in ((MANY, ()), (FEW, (WHOLE_RUN,))):
        for activation in ROUNDINGS:
            refuses = partial(refusals, Scheme(activation.partition("-")[0], activation=activation))
            for kernel, build in (("norm", rounded_norm), ("gate", rounded_gate)):
                launch = partial(build, activation, rows)
                variant = f"{kernel} {activation}" + (f" rows{rows}" if rows == FEW else "")
                found.append(KernelCase("quantized/round", variant, False, launch, refuses, targets))
    found.append(KernelCase("quantized/finish", "int8 4 parts", False, finish))
    return [*found, *_tiles(), *_chosen()]


def _tiles() -> Iterator[KernelCase]:
    """The tile kernel, which only tuning chooses; that it takes fp16 rows, on one target."""
    for name, scheme in TILED.items():
        refuses = partial(refusals, scheme)
        launch = partial(tile, scheme, torch.bfloat16)
        targets = () if name in EVERYWHERE else (WHOLE_RUN,)
        yield KernelCase("quantized/tile", f"{name} bf16", True, launch, refuses, targets)
        launch = partial(tile, scheme, torch.float16)
        yield KernelCase("quantized/tile", f"{name} fp16", True, launch, refuses, (WHOLE_RUN,))


def _chosen() -> Iterator[KernelCase]:
    """Launches that tuning found on the target most runs happen on, each once."""
    seen: set[tuple[Scheme, Kernel | Tile, bool]] = set()
    for (name, scheme), (n, k), size in itertools.product(SCHEMES.items(), WEIGHTS, BUCKETS):
        way = quantized_configs.measured(WHOLE_RUN, UNITS, size, n, k, scheme, torch.bfloat16)
        if not isinstance(way, (Kernel, Tile)) or (scheme, way, k > HIDDEN) in seen:
            continue
        seen.add((scheme, way, k > HIDDEN))
        launch = partial(_launch, scheme, torch.bfloat16, size, n, k, way)
        variant = f"{name} bf16 rows{size} n{n} k{k}"
        matrix = isinstance(way, Tile) or way.block_m > 0
        yield KernelCase("quantized/product", variant, matrix, launch, targets=(WHOLE_RUN,))


def refusals(scheme: Scheme, target: str) -> list[str]:
    """What the backend would say to this scheme on that target."""
    return scheme_refused(scheme, *WEIGHTS[0], target)


def weight_of(scheme: Scheme, n: int, k: int) -> QuantizedWeight:
    """A packed weight that takes no memory."""
    groups = parts(k, scheme.group or k)
    zero = row_scale = None
    if scheme.weight in PACKED:
        words = words_a_span(scheme)
        codes = on_meta(parts(k, CODES * words), n, words, dtype=torch.int16)
        scale = on_meta(groups, n, dtype=SCALES[scheme.scale])
        zero = on_meta(groups, n, dtype=torch.uint8) if scheme.zero_point else None
        row_scale = on_meta(n, dtype=torch.float32) if scheme.scale == "e4m3" else None
    else:
        codes = on_meta(n, k, dtype=KINDS[scheme.weight])
        scale = on_meta(n, 1, dtype=torch.float32)
        if scheme.group is not None:
            scale = on_meta(parts(n, scheme.group_n), groups, dtype=SCALES[scheme.scale])
    return QuantizedWeight(scheme, n, k, codes, scale, zero, row_scale, None, None)


def rows_of(scheme: Scheme, dtype: torch.dtype, count: int, k: int) -> Rows:
    """Rows as the scheme's kernels take them."""
    if scheme.activation is None:
        return Rows(on_meta(count, k, dtype=dtype))
    return Rows(*codes_of(scheme.activation, count, k))


def product(scheme: Scheme, dtype: torch.dtype, size: int, n: int, k: int, target: str) -> Launch:
    """A product launched by the written rule; of one row by the vector kernel, wherever that is chosen."""
    way: Way = quantized_configs.vector(target, k, scheme)
    if size > 1:
        way = quantized_configs.written(target, UNITS, size, n, k, scheme, dtype)
    assert isinstance(way, Kernel)
    return _launch(scheme, dtype, size, n, k, way, target)


def _launch(
    scheme: Scheme, dtype: torch.dtype, size: int, n: int, k: int, way: Kernel | Tile, target: str
) -> Launch:
    rows, out = rows_of(scheme, dtype, size, k), on_meta(size, n, dtype=dtype)
    return product_launches(Place.of(imagined(target)), rows, weight_of(scheme, n, k), None, out, way)[0]


def tile(scheme: Scheme, dtype: torch.dtype, target: str) -> Launch:
    """A product of many rows by the tile kernel, in tiles that fit the target."""
    way = Tile(32 if target.startswith("gfx1") else 64, 64, 4, 2)
    if target in HOPPER:
        stages = 3 if scheme.weight in PACKED else 2
        way = Tile(128, 128, 8, stages, boxes=True, code_boxes=scheme.weight not in PACKED)
    return _launch(scheme, dtype, 256, *WEIGHTS[2], way, target)


def finish(target: str) -> Launch:
    """The sum of a product's parts."""
    way, dtype = Kernel(16, 64, 4, 2, split=4), torch.bfloat16
    scheme, (n, k) = quantization.SCHEMES["int8"], WEIGHTS[1]
    rows, out, bias = rows_of(scheme, dtype, 16, k), on_meta(16, n, dtype=dtype), on_meta(n, dtype=dtype)
    return product_launches(Place.of(imagined(target)), rows, weight_of(scheme, n, k), bias, out, way)[1]


def rounding(activation: str, target: str) -> Launch:
    """Rows as codes."""
    count, k = 16, WEIGHTS[0][1]
    x, (codes, scale) = on_meta(count, k, dtype=torch.bfloat16), codes_of(activation, count, k)
    static = quantization.ACTIVATIONS[activation][2] == "static"
    given = on_meta(1, dtype=torch.float32) if static else None
    return rounding_launch(Place.of(imagined(target)), x, activation, given, codes, scale)


def rounded_norm(activation: str, rows: int, target: str) -> Launch:
    """A norm that leaves codes."""
    place, x = Place.of(imagined(target)), on_meta(rows, HIDDEN, dtype=torch.bfloat16)
    codes = codes_of(activation, rows, HIDDEN)
    return rounded_norm_launch(place, x, x, x[0], 1e-6, activation, *codes)


def rounded_gate(activation: str, rows: int, target: str) -> Launch:
    """A gate that leaves codes."""
    gate_up = on_meta(rows, 2 * FEED_FORWARD, dtype=torch.bfloat16)
    codes = codes_of(activation, rows, FEED_FORWARD)
    return rounded_gate_launch(Place.of(imagined(target)), gate_up, activation, *codes)


def codes_of(activation: str, count: int, k: int) -> tuple[Tensor, Tensor]:
    """Codes and scales that take no memory."""
    kind, group, _ = quantization.ACTIVATIONS[activation]
    shape = (count,) if group is None else (count, parts(k, group))
    return on_meta(count, k, dtype=KINDS[kind]), on_meta(*shape, dtype=torch.float32)


def writing(scheme: Scheme, target: str) -> Launch:
    """A weight written out."""
    n, k = WEIGHTS[1]
    place = Place.of(imagined(target))
    return writing_launch(place, weight_of(scheme, n, k), on_meta(n, k, dtype=torch.bfloat16))
