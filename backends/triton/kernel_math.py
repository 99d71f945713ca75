"""The pieces the attention kernels share: score capping, dots in the right precision, a row's place."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def matmul(a, b, WIDEN: tl.constexpr):
    """a @ b in fp32. WIDEN: cast the operands up, since the interpreter's bf16 dot is wrong."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    if a.dtype == tl.float32:
        return tl.dot(a, b, input_precision="ieee")
    return tl.dot(a, b)


@triton.jit
def scaled_scores(raw, scale, cap, CAPPED: tl.constexpr):
    """q k^T as base-2 logits: `scale` is softmax scale * log2(e), or, CAPPED, scale / cap with cap * log2(e).

    tanh(x) = 1 - 2 / (exp(2 x) + 1), which saturates rightly at both ends.
    """
    if CAPPED:
        return cap * (1.0 - 2.0 / (tl.exp2(raw * (scale * 2.8853900817779268)) + 1.0))
    return raw * scale


@triton.jit
def find_row(ends, item):
    """The row whose half-open range holds `item`, given the ranges' inclusive ends, and its begin."""
    past = ends <= item
    row = tl.sum(past.to(tl.int32), axis=0)
    begin = tl.max(tl.where(past, ends, 0), axis=0)
    return row, begin


@triton.jit
def widened(index, WIDE: tl.constexpr):
    """`index` as i64 where offsets of the cache exceed 32 bits."""
    if WIDE:
        index = index.to(tl.int64)
    return index
