"""silu(gate) * up of a stacked projection (Shazeer 2020, SwiGLU)."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from backbench.backends.triton.launch import overlap, release_successor, wait_for_predecessor


@triton.jit
def silu(x):
    """x * sigmoid(x) in fp32."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def gate_kernel(gate_up, out, row_stride, width, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One program a (row, column block) of the output."""
    release_successor(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    wait_for_predecessor(PDL)
    source = gate_up + row * row_stride + column
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + width, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, (silu(gate) * up).to(out.dtype.element_ty), mask=inside)


def gate(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2F] -> [T, F] in the same dtype; products in fp32."""
    rows, double = gate_up.shape
    width = double // 2
    out = torch.empty((rows, width), dtype=gate_up.dtype, device=gate_up.device)
    if rows == 0:
        return out
    gate_up = gate_up if gate_up.stride(1) == 1 else gate_up.contiguous()
    block = min(1024 if rows <= 64 else 4096, triton.next_power_of_2(width))
    gate_kernel[(rows, triton.cdiv(width, block))](
        gate_up,
        out,
        gate_up.stride(0),
        width,
        BLOCK=block,
        num_warps=4 if block <= 1024 else 8,
        **overlap(gate_up),
    )
    return out
