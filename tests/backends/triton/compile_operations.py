"""Compiles the operation and product kernels for one GPU that is not there; run by the test beside it."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from backends.aot import Resources, compile_kernel
from backends.triton.embedding import embed_kernel
from backends.triton.fused_write import rotate_and_write_kernel
from backends.triton.gate import gate_kernel
from backends.triton.norm import rms_norm_kernel
from backends.triton.rotary import rotate_kernel
from backends.triton.sampling import best_of_row_kernel, greedy_chunk_kernel, random_chunk_kernel
from backends.triton.skinny_gemm import matrix_vector_kernel, skinny_gemm_kernel
from backends.triton.thresholds import (
    candidate_launch,
    candidate_threshold_kernel,
    group_maxima_kernel,
    row_threshold_kernel,
)


def integers(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "i32")


def pointers(kind: str, *names: str) -> dict[str, str]:
    return dict.fromkeys(names, f"*{kind}")


def elementwise(target: str, pdl: bool) -> Iterator[tuple[str, Resources]]:
    """Norm, gate, embedding, rotation and the fused write."""
    signature = pointers("bf16", "x", "residual", "weight", "out") | integers("x_stride", "width")
    constants = {"ADD": True, "BLOCK": 4096, "PDL": pdl}
    yield "norm", compile_kernel(rms_norm_kernel, signature | {"eps": "fp32"}, constants, target, num_warps=8)
    signature = pointers("bf16", "gate_up", "out") | integers("row_stride", "width")
    yield "gate", compile_kernel(gate_kernel, signature, {"BLOCK": 1024, "PDL": pdl}, target)
    signature = {"ids": "*i64"} | pointers("bf16", "table", "out") | integers("table_stride", "width")
    yield "embed", compile_kernel(embed_kernel, signature, {"BLOCK": 2048, "PDL": pdl}, target)
    shared = (
        pointers("bf16", "qkv", "q_weight", "k_weight", "q_out")
        | {"positions": "*i64", "cos_sin": "*fp32", "eps": "fp32"}
        | integers("qkv_stride", "q_heads", "kv_heads", "head_dim", "half")
    )
    constants = {"Q_NORM": True, "K_NORM": True, "HEADS": 8, "BLOCK_D": 128, "PDL": pdl}
    yield "rotate", compile_kernel(rotate_kernel, shared | pointers("bf16", "k_out"), constants, target)
    signature = (
        shared
        | pointers("bf16", "k_cache", "v_cache")
        | {"slots": "*i64"}
        | integers("block_size", "block_stride", "head_stride", "slot_stride")
    )
    yield "rotate and write", compile_kernel(rotate_and_write_kernel, signature, constants, target)


def sampling(target: str, pdl: bool, ptx: bool) -> Iterator[tuple[str, Resources]]:
    """The chunk and row kernels."""
    chosen = pointers("fp32", "best_score") | {"best_token": "*i32"}
    shared = {"logits": "*bf16"} | chosen | integers("row_stride", "vocab_size", "tiles")
    yield "greedy", compile_kernel(greedy_chunk_kernel, shared, {"TILE": 1024, "PDL": pdl}, target)
    signature = shared | pointers("fp32", "temperature", "threshold") | {"noise_key": "*i64"}
    constants = {"FILTER": True, "PTX": ptx, "TILE": 1024, "PDL": pdl}
    yield "random", compile_kernel(random_chunk_kernel, signature, constants, target)
    signature = chosen | {"out": "*i64"} | integers("chunks", "vocab_size")
    yield "row", compile_kernel(best_of_row_kernel, signature, {"BLOCK": 128, "PDL": pdl}, target)


def thresholds(target: str, pdl: bool) -> Iterator[tuple[str, Resources]]:
    """The filters' three kernels at a vocabulary of 151,936."""
    shared = {"logits": "*bf16"} | integers("row_stride", "vocab_size")
    groups = pointers("fp32", "temperature", "maxima", "chunk_top", "chunk_mass") | integers("group_count")
    group, limit, warps = candidate_launch(target)
    constants = {"GROUP": group, "GROUPS": 128, "PDL": pdl}
    yield "groups", compile_kernel(group_maxima_kernel, shared | groups, constants, target, num_warps=8)
    filters = pointers("fp32", "temperature", "top_p", "min_p", "threshold") | {"top_k": "*i32"}
    signature = shared | groups | filters | {"chosen_groups": "*i32"} | integers("chunk_count")
    constants = {"LIMIT": limit, "CANDIDATES": 2 * limit, "GROUP": group, "PDL": pdl}
    constants |= {"BLOCK_GROUPS": 8192 * 32 // group, "BLOCK_CHUNKS": 64}
    resources = compile_kernel(candidate_threshold_kernel, signature, constants, target, num_warps=warps)
    yield "candidates", resources
    constants = {"TILE": 8192, "PDL": pdl}
    yield "whole row", compile_kernel(row_threshold_kernel, shared | filters, constants, target, num_warps=16)


def products(target: str, pdl: bool) -> Iterator[tuple[str, Resources]]:
    """Matrix-vector and skinny products at the default rule's tiles."""
    signature = pointers("bf16", "x", "weight", "bias", "out") | integers("width", "depth")
    shared = {"BIAS": True, "EVEN": False, "PDL": pdl}
    constants = shared | {"BLOCK_N": 4, "BLOCK_K": 512, "STAGES": 1}
    yield "vector", compile_kernel(matrix_vector_kernel, signature, constants, target, num_stages=1)
    depth = 64 if target.startswith("gfx1") else 128
    constants = shared | {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": depth, "STAGES": 2}
    constants |= {"SWAP": False, "WIDEN": False, "LINES": 4 if pdl else 0}
    signature |= integers("count", "x_stride", "early")
    yield "matrix", compile_kernel(skinny_gemm_kernel, signature, constants, target, num_stages=2)


def main(target: str) -> None:
    nvidia = target.startswith("sm")
    pdl = nvidia and int(target[2:]) >= 90
    for name, resources in (
        *elementwise(target, pdl),
        *sampling(target, pdl, nvidia),
        *thresholds(target, pdl),
        *products(target, pdl),
    ):
        assert resources.fits, f"{name} takes {resources.shared_bytes} bytes of shared memory"
        assert not resources.spill_bytes, f"{name} spills {resources.spill_bytes} bytes"
        assert name != "matrix" or resources.matrix_instructions, "the product fell to plain multiply-adds"
        print(name, resources.registers, resources.shared_bytes, resources.matrix_instructions)


if __name__ == "__main__":
    main(sys.argv[1])
