"""Launching the skinny products of `skinny_gemm`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from backbench.backends.triton.gemm_choice import GemmConfig
from backbench.backends.triton.launch import compute_units, interpreted, overlap
from backbench.backends.triton.skinny_gemm import matrix_vector_kernel, skinny_gemm_kernel


def multiply(x: Tensor, weight: Tensor, config: GemmConfig, bias: Tensor | None = None) -> Tensor:
    """x [M, K] by weight [N, K] transposed, plus bias [N]: [M, N] in x's dtype, launched as `config` says.

    A matrix-vector launch (`block_m` 0) serves one row.
    """
    rows, depth = x.shape
    width = weight.shape[0]
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    flags = {
        "BIAS": bias is not None,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "EVEN": depth % config.block_k == 0,
        "STAGES": config.stages,
        "num_warps": config.warps,
        "num_stages": config.stages,
        **overlap(x),
    }
    bias = x if bias is None else bias
    columns = triton.cdiv(width, config.block_n)
    if config.block_m == 0:
        matrix_vector_kernel[(columns,)](x, weight, bias, out, width, depth, **flags)
        return out
    skinny_gemm_kernel[(columns, triton.cdiv(rows, config.block_m))](
        x,
        weight,
        bias,
        out,
        rows,
        width,
        depth,
        x.stride(0),
        2 * compute_units(x.device),
        BLOCK_M=config.block_m,
        LINES=config.lines,
        SWAP=config.swap,
        WIDEN=interpreted(skinny_gemm_kernel),
        **flags,
    )
    return out
