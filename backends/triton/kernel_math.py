"""The pieces the attention kernels share: capped scores, dots in the right precision, an int8 cache."""

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
def seen(key, live, length, position, WINDOW: tl.constexpr, DRAFTED: tl.constexpr):
    """Which of the `live` keys [TILE] a decode of a sequence of `length` keys sees, [1, TILE]; DRAFTED, which
    each row at its own `position` [M] does, [M, TILE]."""
    if DRAFTED:
        shown = live[None, :] & (key[None, :] <= position[:, None])
        if WINDOW > 0:
            shown = shown & (key[None, :] + WINDOW > position[:, None])
    else:
        if WINDOW > 0:
            live = live & (key >= length - WINDOW)
        shown = live[None, :]
    return shown


@triton.jit
def origin_of(maximum, DRAFTED: tl.constexpr):
    """What exponents [M] are taken from: the maximum, but DRAFTED for a row that has seen no key so far."""
    if DRAFTED:
        maximum = tl.where(maximum == float("-inf"), 0.0, maximum)
    return maximum


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


SMALLEST_UNIT = tl.constexpr(2.0**-126)
"""A unit that is smaller than any scale of numbers that fp16 holds."""
INT8_BF16 = tl.constexpr(
    """{ .reg .b32 b, m, s, one; mov.b32 one, 0x3F803F80;
prmt.b32 b, $2, 0x43434343, 0x4140;
and.b32 m, b, 0xFF7FFF7F; lop3.b32 s, b, 0xFF80FF80, 0x80008000, 0x6A;
fma.rn.bf16x2 $0, m, one, s;
prmt.b32 b, $2, 0x43434343, 0x4342;
and.b32 m, b, 0xFF7FFF7F; lop3.b32 s, b, 0xFF80FF80, 0x80008000, 0x6A;
fma.rn.bf16x2 $1, m, one, s; }"""
)
"""Four codes as bf16. 128 to 255 have room for seven bits: those are 128 + (code & 127). The eighth, in the
same place, makes 128 256: what is to be taken off. Both are exact, and so is their difference."""
INT8_FP16 = tl.constexpr(
    """{ .reg .b32 b, w, off; mov.b32 off, 0xE480E480; xor.b32 w, $2, 0x80808080;
prmt.b32 b, w, 0x64646464, 0x4140; add.rn.f16x2 $0, b, off;
prmt.b32 b, w, 0x64646464, 0x4342; add.rn.f16x2 $1, b, off; }"""
)
"""As fp16, whose 1024 to 2047 has room for ten bits: 1024 + (code + 128), less 1152."""


@triton.jit
def operand(stored, like, WIDEN: tl.constexpr, PTX: tl.constexpr):
    """Stored keys or values as an operand beside `like`; codes become their numbers exactly."""
    if stored.dtype == tl.int8:
        if PTX and like.dtype != tl.float32:
            found = tl.inline_asm_elementwise(
                INT8_FP16 if like.dtype == tl.float16 else INT8_BF16,
                "=&r,=&r,r",
                [stored],
                dtype=like.dtype,
                is_pure=True,
                pack=4,
            )
        elif WIDEN:
            found = stored.to(tl.float32)
        else:
            found = stored.to(like.dtype)
    else:
        found = stored.to(like.dtype)
    return found


@triton.jit
def first_unit(like):
    """What `in_units` begins with."""
    return tl.full([], SMALLEST_UNIT if like.dtype == tl.float16 else 1.0, tl.float32)


@triton.jit
def in_units(weights, v_scale, shrink, unit, like):
    """Weights [M, TILE] times their values' scales f32 [TILE], what shrinks the sum [M], and their unit.

    fp16, to which weights are rounded beside `like`, has no room for small scales: there they are over the
    largest scale so far.
    """
    if like.dtype == tl.float16:
        largest = tl.maximum(unit, tl.max(v_scale, axis=0))
        weights = weights * (v_scale / largest)[None, :]
        shrink = shrink * (unit / largest)
        unit = largest
    else:
        weights = weights * v_scale[None, :]
    return weights, shrink, unit


@triton.jit
def load_scales(
    k_scale, v_scale, block, head, key, length, block_stride,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Scales f32 [TILE] of keys `key`, in physical blocks `block`, and of values; 0 from `length` on."""
    row = widened(block, WIDE) * (block_stride // HEAD_DIM) + head * BLOCK_SIZE + key % BLOCK_SIZE
    live = key < length
    return tl.load(k_scale + row, mask=live, other=0.0), tl.load(v_scale + row, mask=live, other=0.0)
