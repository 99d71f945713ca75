"""The launches that tuning tries: the fastest of wide searches over tiles, warps and stages."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from backbench.backends.interface import AttentionSpec, Device
from backbench.backends.triton.gemm_choice import GemmConfig

VECTOR_LAUNCHES = """16/256/4/3 8/1024/8/3 8/512/4/3 4/1024/4/3 16/256/4/1 8/512/4/1 4/1024/4/1 2/2048/4/1
4/2048/8/1 2/1024/2/1 4/512/2/1 8/1024/8/1 8/256/2/1 1/2048/2/1 4/4096/8/1 16/512/8/1 2/1024/4/1 4/512/4/1
2/2048/8/1"""
"""rows / depth / warps / stages of a tile"""
MATRIX_LAUNCHES = {
    16: """64/128/4/4s 64/128/4/3s 64/128/4/6s 128/128/8/4s 128/128/4/2s 16/256/2/5 16/256/2/6 32/256/4/6
32/256/4/4 32/512/4/4 16/512/2/5 8/512/2/6 16/512/2/3 64/256/4/3s""",
    32: "64/128/4/4s 64/128/4/3s 64/256/4/4s 32/512/4/3 128/128/8/2",
    64: "128/128/4/4 32/256/4/4 64/128/4/4 64/128/4/2",
}
"""Bucket -> as above; s = the weight is the wide operand."""
PREFETCHES = (0, 2, 4)
"""Cache lines of each weight row, on NVIDIA."""
DECODE_LAUNCHES = """128/3/4/1/1 64/3/4/2/2 128/2/4/2/2 32/4/2/4/2 64/4/4/1/1 64/2/4/2/1 64/3/4/3/2
128/3/8/1/1 32/2/4/2/2 64/2/4/1/1 32/2/2/2/1"""
"""keys / stages / warps of a tile / programs a compute unit / tiles a program takes at least"""
PREFILL_LAUNCHES = """128/64/2/8/128 128/64/3/8/0 64/64/2/4/168 128/128/3/8/0 128/128/2/8/0 64/64/3/4/0
128/32/2/8/0 64/32/2/4/0 128/64/2/4/0"""
"""query rows / keys / stages / warps of a tile / registers a thread at most (NVIDIA; 0 = no limit)"""


def gemm_launches(size: int, vendor: str = "nvidia") -> Iterator[GemmConfig]:
    """Launches for the bucket of `size` rows."""
    if size == 1:
        for text in VECTOR_LAUNCHES.split():
            n, k, warps, stages = (int(number) for number in text.split("/"))
            yield GemmConfig(0, n, k, warps, stages)
        return
    prefetches = PREFETCHES if vendor == "nvidia" else (0,)
    for text, lines in itertools.product(MATRIX_LAUNCHES[size].split(), prefetches):
        n, k, warps, stages = (int(number) for number in text.strip("s").split("/"))
        yield GemmConfig(max(size, 16), n, k, warps, stages, text.endswith("s"), lines)


def decode_launches() -> Iterator[dict[str, Any]]:
    """Replacements in the written decode configuration."""
    for text in DECODE_LAUNCHES.split():
        tile, stages, warps, programs, least = (int(number) for number in text.split("/"))
        yield {
            "TILE": tile,
            "STAGES": stages,
            "num_warps": warps,
            "programs_per_unit": programs,
            "MIN_TILES": least,
        }


def prefill_launches(device: Device, spec: AttentionSpec) -> Iterator[dict[str, Any]]:
    """Replacements in the written prefill configuration, as boxes where that one would use them."""
    boxes = device.arch in ("sm90", "sm100", "sm103") and spec.head_dim * spec.kv_dtype.itemsize % 16 == 0
    for text in PREFILL_LAUNCHES.split():
        rows, tile, stages, warps, registers = (int(number) for number in text.split("/"))
        launch: dict[str, Any] = {"M": rows, "TILE": tile, "STAGES": stages, "num_warps": warps}
        launch["DESCRIPTOR"] = boxes and spec.block_size % tile == 0
        if device.vendor == "nvidia":
            launch["maxnreg"] = registers or None
        elif registers:
            continue
        yield launch
