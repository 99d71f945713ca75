"""Which kernel multiplies x [M, K] by a weight [N, K]: a measured table, and a written rule beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch

BUCKETS = (1, 2, 4, 8, 16, 32, 64)
"""Row counts a choice is made for; a count belongs to the smallest bucket that holds it."""


@dataclass(frozen=True)
class GemmConfig:
    """Launch of one skinny product. `block_m` 0 = the matrix-vector kernel (one row)."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    swap: bool = False
    """The weight is the wide operand of the matrix instruction (64 rows of it on sm90)."""
    lines: int = 0
    """Cache lines of each weight row prefetched while the predecessor still runs."""


MEASURED: Mapping[tuple[str, int, int, int], GemmConfig | None] = {
    ("sm90", 1, 28672, 4096): GemmConfig(0, 16, 256, 4, 3),
    ("sm90", 1, 6144, 4096): GemmConfig(0, 2, 2048, 4, 1),
    ("sm90", 1, 4096, 4096): GemmConfig(0, 2, 2048, 4, 1),
    ("sm90", 1, 24576, 4096): GemmConfig(0, 8, 1024, 8, 3),
    ("sm90", 1, 4096, 12288): GemmConfig(0, 4, 4096, 8, 1),
    ("sm90", 1, 151936, 4096): GemmConfig(0, 8, 1024, 8, 3),
    ("sm90", 1, 4096, 1024): GemmConfig(0, 4, 1024, 4, 1),
    ("sm90", 1, 1024, 2048): GemmConfig(0, 2, 2048, 4, 1),
    ("sm90", 1, 6144, 1024): GemmConfig(0, 4, 512, 2, 1),
    ("sm90", 1, 1024, 3072): GemmConfig(0, 2, 1024, 2, 1),
    ("sm90", 1, 151936, 1024): GemmConfig(0, 8, 256, 2, 1),
}
"""(architecture, bucket, N, K) -> the fastest found by `benchmarks/gemm.py --sweep`; None = the library."""


def bucket(rows: int) -> int | None:
    """The bucket of `rows`; None above the largest."""
    return next((size for size in BUCKETS if rows <= size), None)


@lru_cache(maxsize=4096)
def choose(arch: str, rows: int, n: int, k: int, dtype: torch.dtype) -> GemmConfig | None:
    """How to multiply `rows` rows by an [n, k] weight; None = the vendor's library.

    fp32 always goes to the library: its products are true fp32 there, and matrix units would not be.
    """
    size = bucket(rows)
    if size is None or dtype == torch.float32:
        return None
    if (arch, size, n, k) in MEASURED:
        return MEASURED[arch, size, n, k]
    return default(arch, size, n, k)


def default(arch: str, size: int, n: int, k: int) -> GemmConfig | None:
    """The rule for shapes and architectures nobody measured: skinny up to 16 rows, then the library.

    About 8 KiB of weight a program and tile in flight; AMD's shared memory holds two such stages.
    """
    if size > 16 or k % 8:
        return None
    if size == 1:
        return GemmConfig(0, 4 if n < 16384 else 8, 1024 if n < 16384 else 512, 4, 1)
    if arch.startswith("gfx"):
        return GemmConfig(16, 16, 64 if arch.startswith("gfx1") else 128, 4, 2)
    return GemmConfig(16, 16 if n < 16384 else 32, 256, 4, 4)
