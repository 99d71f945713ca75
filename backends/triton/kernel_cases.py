"""How each Triton kernel is launched, for compiling it without a GPU: a typical model's sizes.

Attention takes its configuration from `attention_config`, as the runner does; the others take the tiles
that their launch functions choose for a hidden size of 4096 and a vocabulary of 151,936.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from backbench.backends.aot.baseline import KernelCase
from backbench.backends.aot.compile import SHARED_LIMIT_BYTES, Resources, compile_kernel
from backbench.backends.interface import AttentionSpec, Device

TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8e4nv",
}
UNITS = 132
"""Compute units of the imagined device: only tile choices depend on it."""
DEPENDENT_LAUNCH = ("sm90", "sm100", "sm120")
"""Targets whose kernels may start while the one before still ends."""


def cases() -> list[KernelCase]:
    """Every kernel of the backend, at each dtype it is used with."""
    found = []
    for dtype, kv_dtype in (
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float8_e4m3fn),
    ):
        name = TYPES[dtype] if dtype == kv_dtype else f"{TYPES[dtype]}, fp8 cache"
        for bucket in ("write", "decode_small", "decode", "prefill"):
            # fp32 products are exact: on most targets they are plain multiply-adds by nature.
            matrix = bucket != "write" and dtype != torch.float32
            launch = partial(attention, bucket, dtype, kv_dtype)
            refuses = partial(refusals, dtype, kv_dtype)
            found.append(KernelCase(f"attention/{bucket}", name, matrix, launch, refuses))
    for dtype in (torch.bfloat16, torch.float16):
        for kernel in OPERATIONS:
            launch = partial(operation, kernel, TYPES[dtype])
            found.append(KernelCase(f"operations/{kernel}", TYPES[dtype], False, launch))
        found.append(KernelCase("linear/vector", TYPES[dtype], False, partial(vector, TYPES[dtype])))
        found.append(KernelCase("linear/skinny", TYPES[dtype], True, partial(skinny, TYPES[dtype])))
    return found


def imagined(target: str) -> Device:
    """A device of the target's kind."""
    vendor = "nvidia" if target.startswith("sm") else "amd"
    return Device(vendor, target, target, UNITS, 2**36, SHARED_LIMIT_BYTES[target], torch.device("cpu"))


def layer(dtype: torch.dtype, kv_dtype: torch.dtype) -> AttentionSpec:
    """32 query and 8 KV heads of 128 in blocks of 16."""
    return AttentionSpec(32, 8, 128, dtype, kv_dtype, 16, 128**-0.5)


def refusals(dtype: torch.dtype, kv_dtype: torch.dtype, target: str) -> list[str]:
    """What the backend would say to this layer on that target."""
    from backbench.backends.triton.attention import TritonAttention

    return TritonAttention().supports(layer(dtype, kv_dtype), imagined(target))


def build(
    kernel: Any, kinds: dict[str, str], constants: dict[str, Any], target: str, **options: Any
) -> Resources:
    """Compile with those of the arguments that the kernel has; one it lacks a value for is an error."""
    signature = {name: kinds[name] for name in kernel.arg_names if name in kinds}
    aligned = tuple(
        name
        for name, kind in signature.items()
        if kind.startswith("*") or name in ("block_stride", "k_stride", "v_stride")
    )
    used = {name: value for name, value in constants.items() if name in kernel.arg_names}
    return compile_kernel(kernel, signature, used, target, divisible_by_16=aligned, **options)


def attention(bucket: str, dtype: torch.dtype, kv_dtype: torch.dtype, target: str) -> Resources:
    """The attention kernel of a bucket, or the cache write."""
    from backbench.backends.triton.attention_tuning import attention_config
    from backbench.backends.triton.decode_attention import decode_kernel
    from backbench.backends.triton.kv_write import kv_write_kernel
    from backbench.backends.triton.prefill_attention import prefill_kernel

    spec = layer(dtype, kv_dtype)
    kernel = {"write": kv_write_kernel, "prefill": prefill_kernel}.get(bucket, decode_kernel)
    config: dict[str, Any] = {"num_warps": 4}
    if bucket != "write":
        config = attention_config(imagined(target), spec, bucket)
    config.pop("programs_per_unit", None)
    options = {name: config.pop(name) for name in ("num_warps", "maxnreg") if name in config}
    constants = config | {"M": config.get("M", 16)} | _geometry(spec, target)
    plain, cached = f"*{TYPES[dtype]}", f"*{TYPES[kv_dtype]}"
    if config.get("DESCRIPTOR"):
        cached = f"tensordesc<{TYPES[kv_dtype]}[{config['TILE']},{spec.head_dim}]>"
    kinds = dict.fromkeys(("q", "k", "v", "out"), plain)
    kinds |= {"k_cache": cached, "v_cache": cached, "slots": "*i64"}
    kinds |= dict.fromkeys(("block_table", "seq_lens", "query_start", "counters"), "*i32")
    kinds |= {"piece_sums": "*fp32", "piece_stats": "*fp32", "scale": "fp32", "cap": "fp32"}
    kinds |= integers("num_seqs", "first_seq", "table_stride", "block_stride", "k_stride", "v_stride")
    return build(kernel, kinds, constants, target, **options)


def _geometry(spec: AttentionSpec, target: str) -> dict[str, Any]:
    """The constants that follow from the layer alone."""
    return {
        "KV_HEADS": spec.kv_heads,
        "HEADS_PAD": spec.kv_heads,
        "GROUP": spec.q_heads // spec.kv_heads,
        "GROUP_PAD": spec.q_heads // spec.kv_heads,
        "HEAD_DIM": spec.head_dim,
        "PADDED_DIM": spec.head_dim,
        "BLOCK_SIZE": spec.block_size,
        "ROWS": 256,
        "WINDOW": 0,
        "CAPPED": False,
        "WIDE": False,
        "WIDEN": False,
        "PDL": target in DEPENDENT_LAUNCH,
    }


def integers(*names: str) -> dict[str, str]:
    """i32 arguments."""
    return dict.fromkeys(names, "i32")


def pointers(kind: str, *names: str) -> dict[str, str]:
    """Pointer arguments."""
    return dict.fromkeys(names, f"*{kind}")


OPERATIONS = (
    "norm",
    "gate",
    "embed",
    "rotate",
    "rotate and write",
    "greedy sample",
    "random sample",
    "best of row",
    "group maxima",
    "candidate threshold",
    "row threshold",
)


def operation(name: str, dtype: str, target: str) -> Resources:
    """An elementwise or sampling kernel."""
    kernel, signature, constants, options = _launch(name, dtype, target)
    return build(kernel, signature, constants | {"PDL": target in DEPENDENT_LAUNCH}, target, **options)


Launch = tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]


def _launch(name: str, dtype: str, target: str) -> Launch:
    """(kernel, signature, constants, options) of one operation."""
    from backbench.backends.triton.embedding import embed_kernel
    from backbench.backends.triton.gate import gate_kernel
    from backbench.backends.triton.norm import rms_norm_kernel

    if name == "norm":
        kinds = pointers(dtype, "x", "residual", "weight", "out") | integers("x_stride", "width")
        return rms_norm_kernel, kinds | {"eps": "fp32"}, {"ADD": True, "BLOCK": 4096}, {"num_warps": 8}
    if name == "gate":
        kinds = pointers(dtype, "gate_up", "out") | integers("row_stride", "width")
        return gate_kernel, kinds, {"BLOCK": 1024}, {}
    if name == "embed":
        kinds = {"ids": "*i64"} | pointers(dtype, "table", "out") | integers("table_stride", "width")
        return embed_kernel, kinds, {"BLOCK": 2048}, {}
    if name in ("rotate", "rotate and write"):
        return _rotation(name, dtype)
    if name in ("greedy sample", "random sample", "best of row"):
        return _sampling(name, dtype, target)
    return _threshold(name, dtype, target)


def _rotation(name: str, dtype: str) -> Launch:
    from backbench.backends.triton.fused_write import rotate_and_write_kernel
    from backbench.backends.triton.rotary import rotate_kernel

    shared = pointers(dtype, "qkv", "q_weight", "k_weight", "q_out")
    shared |= {"positions": "*i64", "cos_sin": "*fp32", "eps": "fp32"}
    shared |= integers("qkv_stride", "q_heads", "kv_heads", "head_dim", "half")
    constants = {"Q_NORM": True, "K_NORM": True, "HEADS": 8, "BLOCK_D": 128}
    if name == "rotate":
        return rotate_kernel, shared | pointers(dtype, "k_out"), constants, {}
    written = pointers(dtype, "k_cache", "v_cache") | {"slots": "*i64"}
    written |= integers("block_size", "block_stride", "head_stride", "slot_stride")
    return rotate_and_write_kernel, shared | written, constants, {}


def _sampling(name: str, dtype: str, target: str) -> Launch:
    from backbench.backends.triton.sampling import (
        best_of_row_kernel,
        greedy_chunk_kernel,
        random_chunk_kernel,
    )

    chosen = pointers("fp32", "best_score") | {"best_token": "*i32"}
    if name == "best of row":
        kinds = chosen | {"out": "*i64"} | integers("chunks", "vocab_size")
        return best_of_row_kernel, kinds, {"BLOCK": 128}, {}
    shared = {"logits": f"*{dtype}"} | chosen | integers("row_stride", "vocab_size", "tiles")
    if name == "greedy sample":
        return greedy_chunk_kernel, shared, {"TILE": 1024}, {}
    kinds = shared | pointers("fp32", "temperature", "threshold") | {"noise_key": "*i64"}
    constants = {"FILTER": True, "PTX": target.startswith("sm"), "TILE": 1024}
    return random_chunk_kernel, kinds, constants, {}


def _threshold(name: str, dtype: str, target: str) -> Launch:
    from backbench.backends.triton import thresholds

    shared = {"logits": f"*{dtype}"} | integers("row_stride", "vocab_size")
    groups = pointers("fp32", "temperature", "maxima", "chunk_top", "chunk_mass") | integers("group_count")
    group, limit, warps = thresholds.candidate_launch(target)
    if name == "group maxima":
        return thresholds.group_maxima_kernel, shared | groups, {"GROUP": group, "GROUPS": 128}, {}
    filters = pointers("fp32", "temperature", "top_p", "min_p", "threshold") | {"top_k": "*i32"}
    if name == "row threshold":
        return thresholds.row_threshold_kernel, shared | filters, {"TILE": 8192}, {"num_warps": 16}
    constants = {
        "LIMIT": limit,
        "CANDIDATES": 2 * limit,
        "GROUP": group,
        "BLOCK_GROUPS": 8192 * 32 // group,
        "BLOCK_CHUNKS": 64,
    }
    kinds = shared | groups | filters | {"chosen_groups": "*i32"} | integers("chunk_count")
    return thresholds.candidate_threshold_kernel, kinds, constants, {"num_warps": warps}


def vector(dtype: str, target: str) -> Resources:
    """The matrix-vector product."""
    from backbench.backends.triton.skinny_gemm import matrix_vector_kernel

    constants = _shared_constants(target) | {"BLOCK_N": 4, "BLOCK_K": 512, "STAGES": 1}
    return build(matrix_vector_kernel, _product_arguments(dtype), constants, target, num_stages=1)


def skinny(dtype: str, target: str) -> Resources:
    """The product of up to 16 rows."""
    from backbench.backends.triton.skinny_gemm import skinny_gemm_kernel

    depth = 64 if target.startswith("gfx1") else 128
    tiles = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": depth, "STAGES": 2, "SWAP": False, "WIDEN": False}
    constants = _shared_constants(target) | tiles | {"LINES": 4 if target in DEPENDENT_LAUNCH else 0}
    kinds = _product_arguments(dtype) | integers("count", "x_stride", "early")
    return build(skinny_gemm_kernel, kinds, constants, target, num_stages=2)


def _product_arguments(dtype: str) -> dict[str, str]:
    return pointers(dtype, "x", "weight", "bias", "out") | integers("width", "depth")


def _shared_constants(target: str) -> dict[str, Any]:
    return {"BIAS": True, "EVEN": False, "PDL": target in DEPENDENT_LAUNCH}
