"""Which launch a shape gets: what was measured, else a written rule; and the launches that tuning tries.

Nothing is tuned while serving: everything here is a pure function of the device, the shape and the shipped
tables in `tuning/`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from backbench.backends.interface import AttentionSpec, Device, kv_bytes_per_token
from backbench.backends.tuning import table as tuning
from backbench.backends.tuning.table import Config, Entry, Table

FOLDER = Path(__file__).parent / "tuning"
KERNELS = {
    "gemm": ("gemm.py", "matrix_vector_kernel", "skinny_gemm_kernel", "split_gemm_kernel"),
    "packed_gemm": ("packed_gemm.py", "packed_vector_kernel", "packed_gemm_kernel"),
    "byte_gemm": ("byte_gemm.py", "byte_vector_kernel", "byte_gemm_kernel"),
    "sparse_gemm": ("sparse_gemm.py", "sparse_vector_kernel", "sparse_gemm_kernel"),
    "tile_gemm": ("tile_gemm.py", "tile_gemm_kernel"),
    "decode_attention": ("decode_kernel.py", "decode_kernel"),
    "prefill_attention": ("prefill_kernel.py", "prefill_kernel"),
}
"""Operation -> the file and the kernels in it that decide how fast a launch is."""


def table_file(arch: str, units: int) -> Path:
    """Where the table of such a device is kept."""
    return FOLDER / f"{tuning.place(arch, units)}.json"


@lru_cache
def table(arch: str, units: int) -> Table:
    """The table of such a device as this process first read it; empty where there is none."""
    return tuning.read(table_file(arch, units), tuning.place(arch, units))


@lru_cache
def sources(operation: str) -> str:
    """The hash over an operation's kernels."""
    file, *kernels = KERNELS[operation]
    return tuning.kernel_hash(Path(__file__).parent / file, kernels)


def sources_of(operation: str, config: Config | None) -> str:
    """The hash that an operation's entry must carry to hold: over the kernels that its launch runs."""
    return sources("tile_gemm" if config is not None and "tile_m" in config else operation)


def lookup(arch: str, units: int, operation: str, bucket: str, dtype: str) -> Entry | None:
    """The measured entry, or None. float16 takes what bfloat16 was measured with: both are as fast."""
    found = table(arch, units)
    if not found.entries:
        return None
    for name, kernels in itertools.product(_names(dtype), (operation, "tile_gemm")):
        if (entry := found.lookup(operation, bucket, name, sources(kernels))) is not None:
            return entry
    return None


def complaint(arch: str, units: int, operation: str, bucket: str, dtype: str) -> str | None:
    """Why `lookup` gives nothing; None = it gives an entry."""
    if lookup(arch, units, operation, bucket, dtype) is not None:
        return None
    return table(arch, units).complaint(operation, bucket, _names(dtype)[-1], sources(operation))


def product_dtype(dtype: torch.dtype) -> str:
    """A product's dtype as entries name it."""
    return str(dtype).removeprefix("torch.")


def attention_dtype(spec: AttentionSpec) -> str:
    """An attention layer's dtype as entries name it, the cache's beside it where they differ."""
    name = product_dtype(spec.dtype)
    return name if spec.kv_dtype == spec.dtype else f"{name} on {product_dtype(spec.kv_dtype)}"


def _names(dtype: str) -> tuple[str, ...]:
    first, _, rest = dtype.partition(" ")
    twin = f"bfloat16 {rest}".strip()
    return (dtype, twin) if first == "float16" else (dtype,)


ATTENTION_BUCKETS = ("decode_small", "decode", "prefill")
RULED = ("CHUNK", "LEAD_IN")
"""What tuning leaves to the written rule: it follows from the layer, or matters for unequal lengths alone."""
LDS_BYTES = 64 * 1024
"""Shared memory to plan for where the device does not say (the smallest of all supported targets)."""
MERGE_VALUES = 16384
"""fp32 values of other programs' pieces that a program merges at once: 128 registers for 128 threads."""


def small_batch(device: Device, spec: AttentionSpec) -> int:
    """Sequences up to which a decode batch has at most one (sequence, kv head) pair a compute unit."""
    return max(1, device.units // spec.kv_heads)


def attention_config(
    device: Device, spec: AttentionSpec, bucket: str, written: bool = False
) -> dict[str, Any]:
    """Tile sizes, warps and stages for `bucket` on `device`, within its shared memory.

    "decode_small" (up to `small_batch` sequences) and "decode": TILE keys a tile, programs_per_unit,
    MIN_TILES a program takes at least, LEAD_IN tiles that opening a pair counts for where lengths differ,
    CHUNK pieces merged at once.
    "prefill": M query rows and TILE keys a tile, DESCRIPTOR = key tiles as descriptor boxes.
    `written`: by the rule alone, whatever was measured.
    """
    config = written_attention(device, spec, bucket)
    entry = lookup(device.arch, device.units, *entry_key(spec, bucket))
    if entry is not None and entry.config is not None and not written:
        config |= entry.config
    query_bytes = config.get("M", 0) * padded_dim(spec) * spec.dtype.itemsize
    budget = _program_bytes(device, config) - query_bytes
    while config["TILE"] > 16 and config["TILE"] * key_bytes(spec) * max(config["STAGES"] - 1, 1) > budget:
        config["TILE"] //= 2
    return config


def written_attention(device: Device, spec: AttentionSpec, bucket: str) -> dict[str, Any]:
    """The written rule, for what nobody measured."""
    return _prefill(device, spec) if bucket == "prefill" else _decode(device, spec, bucket)


def entry_key(spec: AttentionSpec, bucket: str) -> tuple[str, str, str]:
    """Operation, shape bucket and dtype of a tuning entry.

    Up to 16 query heads a KV head share an entry, since the matrix units' tile has 16 rows anyway: what
    depends on their number (CHUNK) follows from the written rule.
    """
    group = spec.q_heads // spec.kv_heads
    shape = f"d{spec.head_dim} block{spec.block_size}" + (f" group{group}" if group > 16 else "")
    dtype = attention_dtype(spec)
    if bucket == "prefill":
        return "prefill_attention", shape, dtype
    return "decode_attention", f"{'small' if bucket == 'decode_small' else 'large'} {shape}", dtype


def attention_tuning(spec: AttentionSpec, device: Device) -> dict[str, str | None] | None:
    """`Attention.tuning` of one layer: its three kinds of batch."""
    if device.vendor == "cpu":
        return None
    keys = [entry_key(spec, bucket) for bucket in ATTENTION_BUCKETS]
    return {
        f"{operation} {shape}": complaint(device.arch, device.units, operation, shape, dtype)
        for operation, shape, dtype in keys
    }


def shared_bytes_needed(device: Device, spec: AttentionSpec, bucket: str) -> int:
    """Shared memory that a block of the bucket's kernel takes at least, as compiled kernels do.

    On AMD, where loads go through registers, the keys of a tile. On NVIDIA the key tiles in flight, and in
    prefill the queries; before sm80 nothing is copied past the registers, and the fp32 sums pass through
    shared memory instead.
    """
    config = attention_config(device, spec, bucket)
    tile = config["TILE"] * key_bytes(spec)
    if device.vendor != "nvidia":
        return tile // 2
    tiles = tile * max(config["STAGES"] - 1, 1)
    if bucket != "prefill":
        return tiles
    values = config["M"] * padded_dim(spec)
    if before_sm80(device):
        return values * 4 + tile
    return values * spec.dtype.itemsize + tiles


def before_sm80(device: Device) -> bool:
    """True on NVIDIA GPUs without asynchronous copies."""
    return device.vendor == "nvidia" and int(device.arch.removeprefix("sm")) < 80


def padded_dim(spec: AttentionSpec) -> int:
    """head_dim as the kernels hold it: the next power of two."""
    return 1 << (spec.head_dim - 1).bit_length()


def drafts(device: Device, spec: AttentionSpec, config: Config, members: int) -> dict[str, Any]:
    """A decode launch where sequences verify drafts, in tiles of `members` rows.

    Pieces are merged two at a time: more take registers from what comes before. Of two programs a compute
    unit each takes one stage more, if so much memory is there: a program of few rows takes so few registers
    that a third would fit beside two, and those units that get three end last (on an H100 72 us in place of
    66, 64 sequences of 640 keys).
    """
    found = {**config, "CHUNK": 2}
    in_flight = config["STAGES"] * config["TILE"] * key_bytes(spec)
    if members == 16 and config["programs_per_unit"] == 2 and in_flight <= _program_bytes(device, config):
        found["STAGES"] = config["STAGES"] + 1
    return found


def _program_bytes(device: Device, config: Config) -> int:
    """Shared memory that a program may plan with."""
    return (device.shared_bytes or LDS_BYTES) // int(config.get("programs_per_unit", 1)) - 4096


def key_bytes(spec: AttentionSpec) -> int:
    """Shared memory one key and its value take in a tile."""
    return kv_bytes_per_token(1, padded_dim(spec), spec.kv_dtype)


def _decode(device: Device, spec: AttentionSpec, bucket: str) -> dict[str, Any]:
    group_pad = 1 << (spec.q_heads // spec.kv_heads - 1).bit_length()
    config: dict[str, Any] = {
        "TILE": 64,
        "STAGES": 3,
        "num_warps": 4,
        "programs_per_unit": 2,
        "MIN_TILES": 2,
        "LEAD_IN": 2,
        "CHUNK": min(64, max(1, MERGE_VALUES // (group_pad * padded_dim(spec)))),
    }
    if device.vendor == "cpu":
        return config | {"TILE": 16, "STAGES": 1, "programs_per_unit": 3, "MIN_TILES": 1}
    if device.vendor == "amd":
        # Loads go through registers: fewer stages, and on RDNA fewer keys, before they spill.
        return config | {"STAGES": 2, "TILE": 32 if device.arch.startswith("gfx1") else 64}
    large_shared = device.arch in ("sm90", "sm100", "sm103")
    if bucket == "decode_small" and large_shared and spec.dtype != torch.float32:
        # Few keys a program: latency counts, so one program a unit with all its loads in flight.
        config |= {"TILE": 128, "programs_per_unit": 1, "MIN_TILES": 1}
    return config


def _prefill(device: Device, spec: AttentionSpec) -> dict[str, Any]:
    config: dict[str, Any] = {
        "M": 128,
        "TILE": 64,
        "STAGES": 2,
        "num_warps": 8,
        "DESCRIPTOR": False,
    }
    if device.vendor == "cpu":
        return config | {"M": 32, "TILE": 16, "STAGES": 1}
    if spec.dtype == torch.float32:
        return config | {"M": 32, "TILE": 16, "STAGES": 1, "num_warps": 4}
    if device.vendor == "amd":
        config["TILE"] = 32
        config["M"] = 64 if device.arch.startswith("gfx1") else 128
    if padded_dim(spec) > 128:
        return config | {"M": 64, "TILE": 32, "num_warps": 4}
    if device.arch in ("sm90", "sm100", "sm103"):
        aligned = spec.head_dim * spec.kv_dtype.itemsize % 16 == 0  # a descriptor's rows
        config["DESCRIPTOR"] = aligned and spec.block_size % config["TILE"] == 0
    if device.arch == "sm90":
        # Two programs a multiprocessor: one's softmax runs beside the other's products.
        config["maxnreg"] = 128
    return config


KERNEL_BUCKETS = (1, 16, 32, 64)
"""Row counts up to which a kernel of ours may be the faster one."""
ROW_BUCKETS = (*KERNEL_BUCKETS, *range(80, 257, 16))
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
    split: int = 1
    """Parts of a tile's columns that have sums of their own."""


@dataclass(frozen=True)
class ZeroBias:
    """The library's product with a bias of zeros.

    torch computes it through cuBLASLt (hipBLASLt) instead of cuBLAS, and the two pick different kernels for
    some row counts.
    """

    zero_bias: bool = True


Product = GemmConfig | ZeroBias


def product(config: Config) -> Product:
    """The launch that a tuning entry holds."""
    return ZeroBias(**config) if "zero_bias" in config else GemmConfig(**config)


def bucket(rows: int) -> int | None:
    """The bucket of `rows`; None above the largest."""
    return next((size for size in ROW_BUCKETS if rows <= size), None)


def bucket_name(size: int, n: int, k: int) -> str:
    """The bucket as tuning entries name it."""
    return f"m{size} n{n} k{k}"


@lru_cache(maxsize=4096)
def choose(arch: str, units: int, rows: int, n: int, k: int, dtype: torch.dtype) -> Product | None:
    """How to multiply `rows` rows by an [n, k] weight; None = the library, plainly.

    fp32 always goes to the library: its products are true fp32 there, and matrix units would not be.
    """
    size = bucket(rows)
    if size is None or dtype == torch.float32:
        return None
    entry = lookup(arch, units, "gemm", bucket_name(size, n, k), product_dtype(dtype))
    if entry is None:
        return written_product(arch, size, n, k)
    return None if entry.config is None else product(entry.config)


def product_tuning(arch: str, units: int, n: int, k: int, dtype: torch.dtype) -> dict[str, str | None] | None:
    """`Linear.tuning` of an [n, k] weight."""
    if dtype == torch.float32:
        return None
    names = [bucket_name(size, n, k) for size in ROW_BUCKETS]
    return {name: complaint(arch, units, "gemm", name, product_dtype(dtype)) for name in names}


def written_product(arch: str, size: int, n: int, k: int) -> GemmConfig | None:
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


VECTOR_LAUNCHES = """16/256/4/3 8/1024/8/3 8/512/4/3 4/1024/4/3 16/256/4/1 8/512/4/1 4/1024/4/1 2/2048/4/1
4/2048/8/1 2/1024/2/1 4/512/2/1 8/1024/8/1 8/256/2/1 1/2048/2/1 4/4096/8/1 16/512/8/1 2/1024/4/1 4/512/4/1
2/2048/8/1"""
"""rows / depth / warps / stages of a tile"""
MATRIX_LAUNCHES = {
    16: """64/128/4/4s 64/128/4/3s 64/128/4/6s 128/128/8/4s 128/128/4/2s 16/256/2/5 16/256/2/6 32/256/4/6
32/256/4/4 32/512/4/4 16/512/2/5 8/512/2/6 16/512/2/3 64/256/4/3s 8/512/4/6x8 8/512/2/6x4
16/256/4/6sx4 16/512/4/4x4 16/512/4/3x8""",
    32: "64/128/4/4s 64/128/4/3s 64/256/4/4s 32/512/4/3 128/128/8/2",
    64: "128/128/4/4 32/256/4/4 64/128/4/4 64/128/4/2",
}
"""Bucket -> as above; s = the weight is the wide operand; x4 = columns in four parts."""
PREFETCHES = (0, 2, 4, 16)
"""Cache lines of each weight row, on NVIDIA."""
DECODE_LAUNCHES = """128/3/4/1/1 64/3/4/2/2 128/2/4/2/2 32/4/2/4/2 64/4/4/1/1 64/2/4/2/1 64/3/4/3/2
128/3/8/1/1 32/2/4/2/2 64/2/4/1/1 32/2/2/2/1 128/3/4/2/2 64/3/4/4/2"""
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
        tile, _, split = text.partition("x")
        n, k, warps, stages = (int(number) for number in tile.strip("s").split("/"))
        yield GemmConfig(max(size, 16), n, k, warps, stages, tile.endswith("s"), lines, int(split or 1))


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
