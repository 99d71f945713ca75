"""Which kernel multiplies x [M, K] by a weight [N, K]: a measured table, and a written rule beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch

BUCKETS = (1, 16, 32, 64)
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
    ("sm90", 1, 28672, 4096): GemmConfig(0, 2, 2048, 4, 1),
    ("sm90", 1, 6144, 4096): GemmConfig(0, 8, 512, 4, 1),
    ("sm90", 1, 4096, 4096): GemmConfig(0, 4, 1024, 4, 1),
    ("sm90", 1, 24576, 4096): GemmConfig(0, 2, 2048, 4, 1),
    ("sm90", 1, 4096, 12288): GemmConfig(0, 4, 1024, 4, 1),
    ("sm90", 1, 151936, 4096): GemmConfig(0, 8, 1024, 8, 3),
    ("sm90", 1, 4096, 1024): GemmConfig(0, 4, 1024, 4, 1),
    ("sm90", 1, 1024, 2048): GemmConfig(0, 2, 2048, 8, 1),
    ("sm90", 1, 6144, 1024): GemmConfig(0, 8, 512, 4, 1),
    ("sm90", 1, 1024, 3072): GemmConfig(0, 2, 1024, 4, 1),
    ("sm90", 1, 151936, 1024): GemmConfig(0, 4, 512, 2, 1),
    ("sm90", 16, 28672, 4096): None,
    ("sm90", 16, 6144, 4096): GemmConfig(16, 16, 256, 2, 5, lines=4),
    ("sm90", 16, 4096, 4096): GemmConfig(16, 32, 512, 4, 4, lines=4),
    ("sm90", 16, 24576, 4096): GemmConfig(16, 64, 128, 4, 3, swap=True),
    ("sm90", 16, 4096, 12288): GemmConfig(16, 32, 512, 4, 4, lines=4),
    ("sm90", 16, 151936, 4096): GemmConfig(16, 128, 128, 4, 2, swap=True, lines=4),
    ("sm90", 16, 4096, 1024): GemmConfig(16, 64, 128, 4, 6, swap=True, lines=4),
    ("sm90", 16, 1024, 2048): GemmConfig(16, 8, 512, 2, 6, lines=4),
    ("sm90", 16, 6144, 1024): GemmConfig(16, 64, 128, 4, 6, swap=True, lines=2),
    ("sm90", 16, 1024, 3072): GemmConfig(16, 8, 512, 2, 6, lines=4),
    ("sm90", 16, 151936, 1024): GemmConfig(16, 128, 128, 4, 2, swap=True),
    ("sm90", 32, 28672, 4096): None,
    ("sm90", 32, 6144, 4096): None,
    ("sm90", 32, 4096, 4096): GemmConfig(32, 64, 256, 4, 4, swap=True, lines=4),
    ("sm90", 32, 24576, 4096): GemmConfig(32, 64, 128, 4, 3, swap=True, lines=2),
    ("sm90", 32, 4096, 12288): GemmConfig(32, 32, 512, 4, 3, lines=4),
    ("sm90", 32, 151936, 4096): GemmConfig(32, 128, 128, 8, 2),
    ("sm90", 32, 4096, 1024): GemmConfig(32, 64, 256, 4, 4, swap=True, lines=2),
    ("sm90", 32, 1024, 2048): GemmConfig(32, 32, 512, 4, 3, lines=2),
    ("sm90", 32, 6144, 1024): GemmConfig(32, 64, 256, 4, 4, swap=True, lines=4),
    ("sm90", 32, 1024, 3072): None,
    ("sm90", 32, 151936, 1024): GemmConfig(32, 64, 128, 4, 3, swap=True),
    ("sm90", 64, 28672, 4096): GemmConfig(64, 128, 128, 4, 4),
    ("sm90", 64, 6144, 4096): None,
    ("sm90", 64, 4096, 4096): GemmConfig(64, 32, 256, 4, 4, lines=4),
    ("sm90", 64, 24576, 4096): None,
    ("sm90", 64, 4096, 12288): GemmConfig(64, 32, 256, 4, 4, lines=4),
    ("sm90", 64, 151936, 4096): GemmConfig(64, 128, 128, 4, 4),
    ("sm90", 64, 4096, 1024): GemmConfig(64, 32, 256, 4, 4, lines=4),
    ("sm90", 64, 1024, 2048): GemmConfig(64, 32, 256, 4, 4, lines=4),
    ("sm90", 64, 6144, 1024): GemmConfig(64, 64, 128, 4, 4, lines=2),
    ("sm90", 64, 1024, 3072): None,
    ("sm90", 64, 151936, 1024): GemmConfig(64, 128, 128, 4, 4, lines=2),
}
"""(architecture, bucket, N, K) -> the fastest found by `benchmarks/gemm.py --sweep` on an H200, where
it beats the library by more than 2 %; None = the library."""


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
