"""Compiles every attention kernel for one target, as `attention_config` would launch it: a script for tests.

`python attention_aot.py TARGET SPEC` prints JSON: kernel -> its resources. It runs in a process of its own
because kernels decorated for the interpreter cannot be compiled.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from backbench.backends.aot.compile import SHARED_LIMIT_BYTES, Resources, compile_kernel
from backbench.backends.interface import AttentionSpec, Device
from backbench.backends.triton.attention_tuning import attention_config
from backbench.backends.triton.decode_attention import decode_kernel
from backbench.backends.triton.kv_write import kv_write_kernel
from backbench.backends.triton.prefill_attention import prefill_kernel

TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float8_e4m3fn: "fp8e4nv"
}  # fmt: skip
SCALARS = {
    "num_seqs": "i32", "first_seq": "i32", "table_stride": "i32", "block_stride": "i32",
    "scale": "fp32", "cap": "fp32", "k_stride": "i32", "v_stride": "i32",
}  # fmt: skip


def spec(
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    kv: torch.dtype,
    block: int,
    window: int | None,
) -> AttentionSpec:
    return AttentionSpec(q_heads, kv_heads, head_dim, dtype, kv, block, head_dim**-0.5, window)


B16, F16, F32, F8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
SPECS = {
    "qwen3-8b": spec(32, 8, 128, B16, B16, 16, None),
    "block64": spec(32, 8, 128, B16, B16, 64, None),
    "block128": spec(32, 8, 128, B16, B16, 128, None),
    "dim80": spec(28, 4, 80, F16, F16, 32, 100),
    "dim256": spec(16, 2, 256, B16, B16, 16, None),
    "fp32": spec(32, 8, 128, F32, F32, 16, None),
    "fp8": spec(32, 8, 128, B16, F8, 16, None),
}


def make_device(target: str) -> Device:
    vendor = "nvidia" if target.startswith("sm") else "amd"
    place = torch.device("cpu")
    return Device(vendor, target, target, 132, 2**36, SHARED_LIMIT_BYTES[target], place)


def compile_bucket(spec: AttentionSpec, bucket: str, target: str) -> Resources:
    """Compile what the runner launches for `bucket` ("write" for the cache write)."""
    group = spec.q_heads // spec.kv_heads
    padded = 1 << (spec.head_dim - 1).bit_length()
    constants: dict[str, Any] = {
        "KV_HEADS": spec.kv_heads, "GROUP": group, "HEAD_DIM": spec.head_dim, "PADDED_DIM": padded,
        "BLOCK_SIZE": spec.block_size, "ROWS": 256, "WINDOW": spec.window or 0, "CAPPED": False,
        "WIDE": False, "WIDEN": False, "PDL": target in ("sm90", "sm100", "sm120"),
        "GROUP_PAD": 1 << (group - 1).bit_length(), "M": max(16, 1 << (group - 1).bit_length()),
        "HEADS_PAD": 1 << (spec.kv_heads - 1).bit_length(),
    }  # fmt: skip
    kernel = {"write": kv_write_kernel, "prefill": prefill_kernel}.get(bucket, decode_kernel)
    config = {"num_warps": 4} if bucket == "write" else attention_config(make_device(target), spec, bucket)
    config.pop("programs_per_unit", None)
    options = {name: config.pop(name) for name in ("num_warps", "maxnreg") if name in config}
    constants |= config
    cached = f"*{TYPES[spec.kv_dtype]}"
    if config.get("DESCRIPTOR"):
        cached = f"tensordesc<{TYPES[spec.kv_dtype]}[{config['TILE']},{padded}]>"
    plain = f"*{TYPES[spec.dtype]}"
    signature = {
        "q": plain, "k": plain, "v": plain, "out": plain, "k_cache": cached, "v_cache": cached,
        "slots": "*i64", "block_table": "*i32", "seq_lens": "*i32", "query_start": "*i32",
        "piece_sums": "*fp32", "piece_stats": "*fp32", "counters": "*i32", **SCALARS,
    }  # fmt: skip
    signature = {name: signature[name] for name in kernel.arg_names if name in signature}
    aligned = [name for name, kind in signature.items() if kind.startswith("*")]
    aligned += [name for name in ("block_stride", "k_stride", "v_stride") if name in signature]
    return compile_kernel(
        kernel,
        signature,
        {name: value for name, value in constants.items() if name in kernel.arg_names},
        target,
        divisible_by_16=tuple(aligned),
        **options,
    )


if __name__ == "__main__":
    _, target, name = sys.argv
    found = {
        bucket: compile_bucket(SPECS[name], bucket, target)
        for bucket in ("write", "decode_small", "decode", "prefill")
    }
    summary = {
        bucket: {**asdict(resources), "text": "", "fits": resources.fits}
        for bucket, resources in found.items()
    }
    print(json.dumps(summary))
