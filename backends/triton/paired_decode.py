"""Decode attention over a cache of bytes, fp8 (e4m3) or int8, two neighbouring ones at a time.

Matrix units want 16-bit operands, and two things make bytes slow on the way there: values are transposed on
their way from shared memory, which moves 16 bits at least, and no GPU before sm100 converts e4m3 to bf16 in
one instruction (and an integer at a quarter of the rate of a sum). So a row of the cache is read as words of
two bytes, dimensions 2 j and 2 j + 1; each word becomes one number of an even and one of an odd matrix, by
shifts, masks and one exact product or sum; and a head's dimensions are summed, and its output written, in
these two halves. An int8 cache's codes are at most 128, which bf16 and fp16 hold exactly.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from backbench.backends.triton.kernel_math import (
    first_unit,
    in_units,
    load_scales,
    matmul,
    origin_of,
    scaled_scores,
    seen,
    widened,
)

PAIRS_BF16 = tl.constexpr(
    """{ .reg .b32 m, s, up, zero; mov.b32 up, 0x7B807B80; mov.b32 zero, 0x80008000;
shl.b32 m, $2, 4; and.b32 m, m, 0x07F007F0; shl.b32 s, $2, 8; lop3.b32 $0, s, 0x80008000, m, 0xEA;
shr.u32 m, $2, 4; and.b32 m, m, 0x07F007F0; lop3.b32 $1, $2, 0x80008000, m, 0xEA;
fma.rn.bf16x2 $0, $0, up, zero; fma.rn.bf16x2 $1, $1, up, zero; }"""
)
"""e4m3's exponent and mantissa in the low exponent and high mantissa bits of a bf16: the number * 2^-120."""
PAIRS_FP16 = tl.constexpr(
    """{ .reg .b32 m, s, up; mov.b32 up, 0x5C005C00;
shl.b32 m, $2, 7; and.b32 m, m, 0x3F803F80; shl.b32 s, $2, 8; lop3.b32 $0, s, 0x80008000, m, 0xEA;
shr.u32 m, $2, 1; and.b32 m, m, 0x3F803F80; lop3.b32 $1, $2, 0x80008000, m, 0xEA;
mul.rn.f16x2 $0, $0, up; mul.rn.f16x2 $1, $1, up; }"""
)
"""In those of an fp16, the number * 2^-8."""
INT8_PAIRS_BF16 = tl.constexpr(
    """{ .reg .b32 w, m, s, one; mov.b32 one, 0x3F803F80; shr.u32 w, $2, 8;
lop3.b32 m, $2, 0x007F007F, 0x43004300, 0xEA; lop3.b32 s, $2, 0x00800080, 0xC300C300, 0xEA;
fma.rn.bf16x2 $0, m, one, s;
lop3.b32 m, w, 0x007F007F, 0x43004300, 0xEA; lop3.b32 s, w, 0x00800080, 0xC300C300, 0xEA;
fma.rn.bf16x2 $1, m, one, s; }"""
)
"""As `kernel_math.INT8_BF16`: 128 + (code & 127), and what is to be taken off, -128 or -256."""
INT8_PAIRS_FP16 = tl.constexpr(
    """{ .reg .b32 w, off; mov.b32 off, 0xE480E480; shr.u32 w, $2, 8;
lop3.b32 $0, $2, 0x00FF00FF, 0x64806480, 0x6A; add.rn.f16x2 $0, $0, off;
lop3.b32 $1, w, 0x00FF00FF, 0x64806480, 0x6A; add.rn.f16x2 $1, $1, off; }"""
)
"""In an fp16's mantissa, 1024 + (code + 128), less 1152."""


@triton.jit
def both_halves(words, like, ASSEMBLY: tl.constexpr):
    """What `ASSEMBLY` makes of two i16 words at a time: two tensors in the dtype of `like`."""
    return tl.inline_asm_elementwise(
        ASSEMBLY, "=&r,=&r,r", [words], dtype=(like.dtype, like.dtype), is_pure=True, pack=2
    )


@triton.jit
def e4m3(byte):
    """f32 of e4m3 codes in the low eight bits of i32; exact, but NaN becomes 480."""
    bits = ((byte & 0x80) << 24) | ((byte & 0x7F) << 20)
    return bits.to(tl.float32, bitcast=True) * 1.3292279957849159e36  # 2^120


@triton.jit
def e4m3_pairs(words, like, PTX: tl.constexpr):
    """The low and the high bytes of i16 words, two tensors in the dtype of `like`; exact, but NaN is 480."""
    if PTX and like.dtype != tl.float32:
        found = both_halves(words, like, PAIRS_FP16 if like.dtype == tl.float16 else PAIRS_BF16)
    else:
        bits = words.to(tl.int32)
        found = (e4m3(bits & 0xFF).to(like.dtype), e4m3((bits >> 8) & 0xFF).to(like.dtype))
    return found


@triton.jit
def int8_pairs(words, like, PTX: tl.constexpr):
    """The low and the high bytes of i16 words, signed, as two tensors in the dtype of `like`; exact."""
    if PTX and like.dtype != tl.float32:
        found = both_halves(words, like, INT8_PAIRS_FP16 if like.dtype == tl.float16 else INT8_PAIRS_BF16)
    else:
        bits = words.to(tl.int32)
        found = ((bits << 24 >> 24).to(tl.float32).to(like.dtype), (bits >> 8).to(tl.float32).to(like.dtype))
    return found


@triton.jit
def byte_pairs(words, like, PTX: tl.constexpr, SCALED: tl.constexpr):
    """Bytes of an fp8 cache, or SCALED those of an int8 one, as numbers: dimensions 2 j, and 2 j + 1."""
    if SCALED:
        found = int8_pairs(words, like, PTX)
    else:
        found = e4m3_pairs(words, like, PTX)
    return found


@triton.jit
def paired_piece(
    q, k_cache, v_cache, k_scale, v_scale, table, head, length, position, first, last, scale, cap,
    block_stride,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr,
    WIDEN: tl.constexpr, PTX: tl.constexpr, SCALED: tl.constexpr, DRAFTED: tl.constexpr,
):  # fmt: skip
    """`decode_kernel.decode_piece` for an fp8 cache, or SCALED an int8 one, of an even HEAD_DIM."""
    M: tl.constexpr = q.shape[0]
    HALF: tl.constexpr = PADDED_DIM // 2
    k_words = k_cache.to(tl.pointer_type(tl.int16), bitcast=True)
    v_words = v_cache.to(tl.pointer_type(tl.int16), bitcast=True)
    q_even, q_odd = tl.split(tl.reshape(q, [M, HALF, 2]))
    maximum = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    sums_even = tl.zeros([M, HALF], tl.float32)
    sums_odd = tl.zeros([M, HALF], tl.float32)
    unit = first_unit(q)
    column = tl.arange(0, HALF)
    within = tl.arange(0, TILE)
    block = tl.load(table + (first * TILE + within) // BLOCK_SIZE, first * TILE + within < length, other=0)
    for tile in tl.range(first, last, num_stages=STAGES):
        key = tile * TILE + within
        live = key < length
        start = widened(block, WIDE) * (block_stride // 2)
        start += (head * BLOCK_SIZE + key % BLOCK_SIZE) * (HEAD_DIM // 2)
        offsets = start[:, None] + column[None, :]
        mask = live[:, None]
        if PADDED_DIM != HEAD_DIM:
            mask = mask & (column < HEAD_DIM // 2)[None, :]
        k = tl.load(k_words + offsets, mask=mask, other=0)
        v = tl.load(v_words + offsets, mask=mask, other=0)
        factor = scale
        if SCALED:
            k_step, v_step = load_scales(
                k_scale, v_scale, block, head, key, length, block_stride, HEAD_DIM, BLOCK_SIZE, WIDE
            )
            factor = scale * k_step[None, :]
        # The next tile's blocks are fetched one turn ahead: a key's address never waits for them.
        block = tl.load(table + (key + TILE) // BLOCK_SIZE, mask=key + TILE < length, other=0)
        k_even, k_odd = byte_pairs(k, q, PTX, SCALED)
        raw = matmul(q_even, tl.trans(k_even), WIDEN) + matmul(q_odd, tl.trans(k_odd), WIDEN)
        scores = scaled_scores(raw, factor, cap, CAPPED)
        scores = tl.where(seen(key, live, length, position, WINDOW, DRAFTED), scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
        origin = origin_of(new_maximum, DRAFTED)
        weights = tl.exp2(scores - origin[:, None])
        shrink = tl.exp2(maximum - origin)
        total = total * shrink + tl.sum(weights, axis=1)
        if SCALED:
            weights, shrink, unit = in_units(weights, v_step, shrink, unit, q)
        v_even, v_odd = byte_pairs(v, q, PTX, SCALED)
        weights = weights.to(q.dtype)
        sums_even = sums_even * shrink[:, None] + matmul(weights, v_even, WIDEN)
        sums_odd = sums_odd * shrink[:, None] + matmul(weights, v_odd, WIDEN)
        maximum = new_maximum
    sums = tl.interleave(sums_even, sums_odd)
    if SCALED:
        sums *= unit
    return sums, maximum, total
