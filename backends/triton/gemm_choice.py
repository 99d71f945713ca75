"""Which kernel multiplies x [M, K] by a weight [N, K]: what was measured, else a written rule."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from backbench.backends.triton import tuned
from backbench.backends.tuning.table import Config

KERNEL_BUCKETS = (1, 16, 32, 64)
"""Row counts up to which a kernel of ours may be the faster one."""
BUCKETS = (*KERNEL_BUCKETS, *range(80, 257, 16))
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


@dataclass(frozen=True)
class ZeroBias:
    """The library's product with a bias of zeros.

    torch computes it through cuBLASLt (hipBLASLt) instead of cuBLAS, and the two pick different kernels for
    some row counts.
    """

    zero_bias: bool = True


Launch = GemmConfig | ZeroBias


def launch(config: Config) -> Launch:
    """The launch that a tuning entry holds."""
    return ZeroBias(**config) if "zero_bias" in config else GemmConfig(**config)


def bucket(rows: int) -> int | None:
    """The bucket of `rows`; None above the largest."""
    return next((size for size in BUCKETS if rows <= size), None)


def bucket_name(size: int, n: int, k: int) -> str:
    """The bucket as tuning entries name it."""
    return f"m{size} n{n} k{k}"


@lru_cache(maxsize=4096)
def choose(arch: str, units: int, rows: int, n: int, k: int, dtype: torch.dtype) -> Launch | None:
    """How to multiply `rows` rows by an [n, k] weight; None = the library, plainly.

    fp32 always goes to the library: its products are true fp32 there, and matrix units would not be.
    """
    size = bucket(rows)
    if size is None or dtype == torch.float32:
        return None
    entry = tuned.lookup(arch, units, "gemm", bucket_name(size, n, k), tuned.product_dtype(dtype))
    if entry is None:
        return default(arch, size, n, k)
    return None if entry.config is None else launch(entry.config)


def tuning(arch: str, units: int, n: int, k: int, dtype: torch.dtype) -> dict[str, str | None] | None:
    """`Linear.tuning` of an [n, k] weight."""
    if dtype == torch.float32:
        return None
    names = [bucket_name(size, n, k) for size in BUCKETS]
    return {name: tuned.complaint(arch, units, "gemm", name, tuned.product_dtype(dtype)) for name in names}


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
