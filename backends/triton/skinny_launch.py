"""Launching the skinny products of `skinny_gemm`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from backends.interface import BackendError
from backends.triton.gemm_choice import GemmConfig
from backends.triton.launch import compute_units, interpreted, overlap
from backends.triton.linear import NormInput
from backends.triton.skinny_gemm import matrix_vector_kernel, skinny_gemm_kernel


def multiply(
    x: Tensor,
    weight: Tensor,
    config: GemmConfig,
    bias: Tensor | None = None,
    *,
    norm: NormInput | None = None,
    gate: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """x [M, K] by weight [N, K] as `TritonLinear.run_fused` says, launched as `config` says."""
    rows, depth = x.shape
    width = weight.shape[0] // 2 if gate else weight.shape[0]
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    # Gated rows come in pairs: half as many outputs a program read as many bytes.
    narrow = gate and config.block_n > (1 if config.block_m == 0 else 64 if config.swap else 16)
    block_n = config.block_n // 2 if narrow else config.block_n
    flags = {
        "GATE": gate,
        "BIAS": bias is not None,
        "RESIDUAL": residual is not None,
        "BLOCK_N": block_n,
        "BLOCK_K": config.block_k,
        "EVEN": depth % config.block_k == 0,
        "STAGES": config.stages,
        "num_warps": config.warps,
        "num_stages": config.stages,
        **overlap(x),
    }
    optional_bias = x if bias is None else bias
    optional_residual = x if residual is None else residual
    if config.block_m == 0:
        matrix_vector_kernel[(triton.cdiv(width, block_n),)](
            x,
            weight,
            optional_bias,
            x if norm is None else norm.weight,
            optional_residual,
            out,
            width,
            depth,
            0.0 if norm is None else norm.eps,
            NORM=norm is not None,
            **flags,
        )
        return out
    if norm is not None:
        raise BackendError("Only the product of a single row norms its input; norm it first.")
    skinny_gemm_kernel[(triton.cdiv(width, block_n), triton.cdiv(rows, config.block_m))](
        x,
        weight,
        optional_bias,
        optional_residual,
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
