"""Launch configurations of the attention kernels: written defaults, and over them what was measured.

Nothing is tuned while serving. `attention_config` is a pure function of the device, the spec and the
bucket.
"""

from __future__ import annotations

from typing import Any

import torch

from backbench.backends.interface import AttentionSpec, Device
from backbench.backends.triton import tuned

BUCKETS = ("decode_small", "decode", "prefill")
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
    config = default(device, spec, bucket)
    entry = tuned.lookup(device.arch, device.units, *entry_key(spec, bucket))
    if entry is not None and entry.config is not None and not written:
        config |= entry.config
    query_bytes = config.get("M", 0) * padded_dim(spec) * spec.dtype.itemsize
    budget = (device.shared_bytes or LDS_BYTES) // config.get("programs_per_unit", 1) - 4096 - query_bytes
    while config["TILE"] > 16 and config["TILE"] * key_bytes(spec) * max(config["STAGES"] - 1, 1) > budget:
        config["TILE"] //= 2
    return config


def default(device: Device, spec: AttentionSpec, bucket: str) -> dict[str, Any]:
    """The written rule, for what nobody measured."""
    return _prefill(device, spec) if bucket == "prefill" else _decode(device, spec, bucket)


def entry_key(spec: AttentionSpec, bucket: str) -> tuple[str, str, str]:
    """Operation, shape bucket and dtype of a tuning entry.

    Up to 16 query heads a KV head share an entry, since the matrix units' tile has 16 rows anyway: what
    depends on their number (CHUNK) follows from the written rule.
    """
    group = spec.q_heads // spec.kv_heads
    shape = f"d{spec.head_dim} block{spec.block_size}" + (f" group{group}" if group > 16 else "")
    dtype = tuned.attention_dtype(spec)
    if bucket == "prefill":
        return "prefill_attention", shape, dtype
    return "decode_attention", f"{'small' if bucket == 'decode_small' else 'large'} {shape}", dtype


def tuning(spec: AttentionSpec, device: Device) -> dict[str, str | None] | None:
    """`Attention.tuning` of one layer: its three kinds of batch."""
    if device.vendor == "cpu":
        return None
    keys = [entry_key(spec, bucket) for bucket in BUCKETS]
    return {
        f"{operation} {shape}": tuned.complaint(device.arch, device.units, operation, shape, dtype)
        for operation, shape, dtype in keys
    }


def padded_dim(spec: AttentionSpec) -> int:
    """head_dim as the kernels hold it: the next power of two."""
    return 1 << (spec.head_dim - 1).bit_length()


def key_bytes(spec: AttentionSpec) -> int:
    """Shared memory one key and its value take in a tile."""
    return 2 * padded_dim(spec) * spec.kv_dtype.itemsize


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
