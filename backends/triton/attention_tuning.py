"""Launch configurations of the attention kernels: written defaults, and what was tuned on real hardware.

Nothing is tuned while serving. `attention_config` is a pure function of the device, the spec and the
bucket ("decode" or "prefill").
"""

from __future__ import annotations

from typing import Any

import torch

from backends.interface import AttentionSpec, Device

LDS_BYTES = 64 * 1024
"""Shared memory to plan for where the device does not say (the smallest of all supported targets)."""


def attention_config(device: Device, spec: AttentionSpec, bucket: str) -> dict[str, Any]:
    """Tile sizes, warps and stages for `bucket` on `device`, within its shared memory.

    "decode": TILE keys a tile, programs_per_unit, MIN_TILES a program takes at least, CHUNK pieces merged
    at once. "prefill": M query rows and TILE keys a tile, DESCRIPTOR = tiles as descriptor boxes.
    """
    if bucket == "decode":
        return _decode(device, spec)
    return _prefill(device, spec)


def key_bytes(spec: AttentionSpec) -> int:
    """Shared memory one key and its value take in a tile."""
    padded_dim = 1 << (spec.head_dim - 1).bit_length()
    return 2 * padded_dim * spec.kv_dtype.itemsize


def _decode(device: Device, spec: AttentionSpec) -> dict[str, Any]:
    padded_dim = 1 << (spec.head_dim - 1).bit_length()
    group_pad = 1 << (spec.q_heads // spec.kv_heads - 1).bit_length()
    config: dict[str, Any] = {
        "TILE": 64, "STAGES": 3, "num_warps": 4, "programs_per_unit": 2, "MIN_TILES": 1,
        "MERGE_STAGES": 1, "PREFETCH": 0,
    }  # fmt: skip
    if device.vendor == "nvidia" and int(device.arch[2:]) >= 90:
        config["PREFETCH"] = 2
    if device.vendor == "amd":
        config |= {"STAGES": 2, "TILE": 32 if device.arch.startswith("gfx1") else 64}
    elif device.vendor == "cpu":
        config |= {"TILE": 16, "STAGES": 1, "programs_per_unit": 3}
    budget = (device.shared_bytes or LDS_BYTES) // config["programs_per_unit"] - 4096
    while config["TILE"] > 16 and key_bytes(spec) * config["TILE"] * max(config["STAGES"] - 1, 1) > budget:
        config["TILE"] //= 2
    config["CHUNK"] = max(1, 8192 // (group_pad * padded_dim))
    return config


def _prefill(device: Device, spec: AttentionSpec) -> dict[str, Any]:
    padded_dim = 1 << (spec.head_dim - 1).bit_length()
    config: dict[str, Any] = {"M": 128, "TILE": 64, "STAGES": 2, "num_warps": 8, "DESCRIPTOR": False}
    if device.vendor == "cpu":
        return config | {"M": 32, "TILE": 16, "STAGES": 1}
    if spec.dtype == torch.float32:
        return config | {"M": 32, "TILE": 16, "STAGES": 1, "num_warps": 4}
    if device.vendor == "nvidia" and int(device.arch[2:]) in (90, 100):
        config["STAGES"] = 3
        config["DESCRIPTOR"] = spec.block_size % config["TILE"] == 0
    if padded_dim > 128:
        config |= {"M": 64, "TILE": 32, "DESCRIPTOR": False}
    if device.arch.startswith("gfx1"):
        config |= {"M": 64, "TILE": 32}
    budget = (device.shared_bytes or LDS_BYTES) - 2048 - config["M"] * padded_dim * spec.dtype.itemsize
    while config["TILE"] > 16 and key_bytes(spec) * config["TILE"] * max(config["STAGES"] - 1, 1) > budget:
        config["TILE"] //= 2
    return config
