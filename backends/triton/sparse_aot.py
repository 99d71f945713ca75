"""The launches of products by 2:4 weights compiled without a GPU, as the written rule has them."""

from __future__ import annotations

from functools import partial

import torch

from backbench.backends.interface import KernelCase
from backbench.backends.triton import quantized_configs
from backbench.backends.triton.aot_cases import UNITS, WEIGHTS, WHOLE_RUN, imagined, on_meta
from backbench.backends.triton.launch import Launch, Place, parts
from backbench.backends.triton.quantized_configs import SPARSE_SPAN, Kernel
from backbench.backends.triton.sparse import positions_launch, product_launches, writing_launch
from backbench.backends.triton.sparse_weight import WORDS, SparseWeight

CUTLASS = ("sm80", "sm86", "sm89")
"""Where torch's product by CUTLASS runs."""


def sparse_cases() -> list[KernelCase]:
    """Products of one row and of some, the weight written out, and its positions in a library's order."""
    found = []
    for dtype, name, targets in (
        (torch.bfloat16, "bf16", ()),
        (torch.float16, "fp16", (WHOLE_RUN, "gfx942")),
    ):
        for size in (1, 16, 64):
            launch = partial(product, dtype, size)
            variant = f"{name} rows{size}"
            found.append(KernelCase("sparse/product", variant, size > 1, launch, targets=targets))
    found.append(KernelCase("sparse/write", "bf16", False, writing))
    found.append(KernelCase("sparse/positions", "for CUTLASS", False, positions, targets=CUTLASS))
    return found


def weight_of(n: int, k: int, dtype: torch.dtype) -> SparseWeight:
    """A packed weight that takes no memory."""
    positions = on_meta(parts(k, SPARSE_SPAN), n, WORDS, dtype=torch.int16)
    return SparseWeight(n, k, on_meta(n, k // 2, dtype=dtype), positions)


def product(dtype: torch.dtype, size: int, target: str) -> Launch:
    """A product launched by the written rule."""
    n, k = WEIGHTS[2]
    way = quantized_configs.sparse_written(target, UNITS, size, n, k)
    assert isinstance(way, Kernel)
    x, out = on_meta(size, k, dtype=dtype), on_meta(size, n, dtype=dtype)
    return product_launches(Place.of(imagined(target)), x, weight_of(n, k, dtype), None, out, way)[0]


def writing(target: str) -> Launch:
    """A weight written out with its zeros."""
    n, k = WEIGHTS[1]
    out = on_meta(n, k, dtype=torch.bfloat16)
    return writing_launch(Place.of(imagined(target)), weight_of(n, k, torch.bfloat16), out)


def positions(target: str) -> Launch:
    """Positions in the order of CUTLASS."""
    n, k = WEIGHTS[1]
    out = on_meta(n, k // 16, dtype=torch.int16)
    return positions_launch(Place.of(imagined(target)), weight_of(n, k, torch.bfloat16), out)
