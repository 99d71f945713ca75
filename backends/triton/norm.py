"""Root-mean-square norm, alone and fused with the residual sum (Zhang & Sennrich 2019)."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from backbench.backends.triton.launch import overlap, release_successor, wait_for_predecessor


@triton.jit
def rms_norm_kernel(
    x,
    residual,
    weight,
    out,
    x_stride,
    width,
    eps,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program a row: out = norm(x [+ residual]) * weight; with ADD the sum replaces `residual`."""
    release_successor(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    wait_for_predecessor(PDL)
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        carried = tl.load(residual + row * width + column, mask=inside, other=0.0).to(tl.float32)
        total = (value + carried).to(residual.dtype.element_ty)
        tl.store(residual + row * width + column, total, mask=inside)
        value = total.to(tl.float32)
    mean_square = tl.sum(value * value, axis=0) / width
    value = value * (1.0 / tl.sqrt_rn(mean_square + eps)) * scale
    tl.store(out + row * width + column, value.to(out.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """Norm of x [T, H] (rows may be strided); `residual` [T, H] is summed in first and keeps the sum."""
    rows, width = x.shape
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    if rows == 0:
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    block = triton.next_power_of_2(width)
    # Few rows: latency counts, so many warps share a row. Many rows: 16 values a thread keep loads wide.
    warps = min(max(block // (512 if rows > 512 else 256), 1), 16)
    rms_norm_kernel[(rows,)](
        x,
        x if residual is None else residual,
        weight,
        out,
        x.stride(0),
        width,
        eps,
        ADD=residual is not None,
        BLOCK=block,
        num_warps=warps,
        **overlap(x),
    )
    return out
