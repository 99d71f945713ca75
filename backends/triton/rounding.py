"""What surrounds a quantized product: rows rounded to codes, weights written out, partial sums finished."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from backbench.backends.triton.codes import code, exact_scale
from backbench.backends.triton.launch import release_successor, wait_for_predecessor

NEAREST_EVEN = tl.constexpr(12582912.0)
"""1.5 * 2^23: adding and subtracting it rounds a small float to the nearest integer, halves to even."""


@triton.jit
def to_e4m3(number):
    """The nearest e4m3 number, halves to even; beyond 448 is 448. (A cast rounds as its compiler does.)"""
    number = tl.minimum(tl.maximum(number, -448.0), 448.0)
    power = (number.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    # The last of three bits after the leading one, and not below that of 2^-6.
    shift = tl.maximum(power, 0.015625) * 1572864.0
    return (number + shift) - shift


@triton.jit
def to_int8(number):
    """The nearest integer of f32 numbers from -128 to 127, halves to even."""
    number = tl.minimum(tl.maximum(number, -128.0), 127.0)
    # The sum's last bits are the integer: nothing can be simplified away.
    return ((number + NEAREST_EVEN).to(tl.int32, bitcast=True) - 0x4B400000).to(tl.int8)


@triton.jit
def row_steps(value, GROUPED: tl.constexpr, TOP: tl.constexpr):
    """f32 [spans]: what codes of `value` [spans, columns] are multiples of, its largest magnitude over TOP.

    TOP: 448 for e4m3, 127.5 for int8. GROUPED: every span has its own; else all have the same.
    """
    largest = tl.max(tl.abs(value), axis=1)
    if not GROUPED:
        largest = tl.zeros_like(largest) + tl.max(largest, axis=0)
    return tl.div_rn(largest, tl.full(largest.shape, TOP, tl.float32))


@triton.jit
def store_codes(value, step, codes, scale, row, first, depth, GROUPED: tl.constexpr, SMALLEST: tl.constexpr):
    """Spans `first` on of row `row`, f32 [spans, columns] that are 0 past `depth`, over their steps [spans].

    Rounded they go to codes [row, depth]; the steps to scale [row], or [row, groups] where GROUPED: every
    span has its own.
    """
    SPANS: tl.constexpr = value.shape[0]
    SPAN: tl.constexpr = value.shape[1]
    span = first + tl.arange(0, SPANS)
    k = span[:, None] * SPAN + tl.arange(0, SPAN)[None, :]
    divisor = tl.maximum(step, SMALLEST)
    number = tl.div_rn(value, tl.zeros_like(value) + divisor[:, None])
    if codes.dtype.element_ty == tl.int8:
        rounded = to_int8(number)
    else:
        rounded = to_e4m3(number).to(codes.dtype.element_ty)
    tl.store(codes + row * depth + k, rounded, mask=k < depth)
    if GROUPED:
        groups = tl.cdiv(depth, SPAN)
        tl.store(scale + row * groups + span, step, mask=span < groups)
    else:
        tl.store(scale + row + span, step, mask=span == 0)


@triton.jit
def round_rows_kernel(
    x,
    input_scale,
    codes,
    scale,
    depth,
    x_stride,
    STATIC: tl.constexpr,
    GROUPED: tl.constexpr,
    TOP: tl.constexpr,
    SMALLEST: tl.constexpr,
    SPANS: tl.constexpr,
    SPAN: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row of x [depth] over its scale, rounded: codes [row, depth], scale [row] or [row, groups].

    A scale is the largest magnitude over TOP (448 for e4m3, 127.5 for int8), or STATIC: `input_scale`.
    GROUPED: every SPAN columns have their own.
    """
    release_successor(PDL)
    row = tl.program_id(0).to(tl.int64)
    span = tl.arange(0, SPANS)
    k = span[:, None] * SPAN + tl.arange(0, SPAN)[None, :]
    wait_for_predecessor(PDL)
    value = tl.load(x + row * x_stride + k, mask=k < depth, other=0.0).to(tl.float32)
    if STATIC:
        step = tl.full((SPANS,), 0.0, tl.float32) + tl.load(input_scale)
    else:
        step = row_steps(value, GROUPED, TOP)
    store_codes(value, step, codes, scale, row, 0, depth, GROUPED, SMALLEST)


@triton.jit(do_not_specialize=["count"])
def finish_kernel(
    parts,
    scale,
    row_scale,
    x_scale,
    bias,
    out,
    count,
    width,
    BIAS: tl.constexpr,
    ROW_SCALE: tl.constexpr,
    X_SCALE: tl.constexpr,
    CHANNEL: tl.constexpr,
    SCALE_KIND: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """out [count, width] from fp32 parts [PARTS, count, width], added in order, with whole rows' scales."""
    release_successor(PDL)
    row = tl.program_id(1)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = n < width
    place = row.to(tl.int64) * width + n
    wait_for_predecessor(PDL)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts + place + tl.cast(part, tl.int64) * count * width, mask=live, other=0.0)
    if CHANNEL:
        total *= exact_scale(tl.load(scale + tl.minimum(n, width - 1)), SCALE_KIND)
    if ROW_SCALE:
        total *= tl.load(row_scale + n, mask=live, other=0.0)
    if X_SCALE:
        total *= tl.load(x_scale + row)
    if BIAS:
        total += tl.load(bias + n, mask=live, other=0.0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=live)


@triton.jit
def write_packed_kernel(
    words,
    scale,
    zero,
    row_scale,
    out,
    width,
    depth,
    ROW_SCALE: tl.constexpr,
    ZERO: tl.constexpr,
    KIND: tl.constexpr,
    SCALE_KIND: tl.constexpr,
    GROUP: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """One span of BLOCK_N rows of a four-bit weight as numbers: out [width, depth]."""
    release_successor(PDL)
    span = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, width - 1)
    e = tl.arange(0, WORDS)
    wait_for_predecessor(PDL)
    word = tl.load(words + (span.to(tl.int64) * width + row)[:, None] * WORDS + e[None, :])
    for J in tl.static_range(4):
        k = span * (4 * WORDS) + J * WORDS
        group = tl.minimum(k, depth - 1) // GROUP if GROUP > 0 else 0
        at = group * width + row
        step = exact_scale(tl.load(scale + at), SCALE_KIND)
        number = code(word, J, KIND)
        if ZERO:
            number -= tl.load(zero + at).to(tl.float32)[:, None]
        elif KIND == "int4":
            number -= 8.0
        number *= step[:, None]
        if ROW_SCALE:
            number *= tl.load(row_scale + row)[:, None]
        place = row.to(tl.int64)[:, None] * depth + k + e[None, :]
        tl.store(out + place, number.to(out.dtype.element_ty), mask=(k + e < depth)[None, :])


@triton.jit
def write_bytes_kernel(
    weight,
    scale,
    zero,
    row_scale,
    out,
    width,
    depth,
    groups,
    ROW_SCALE: tl.constexpr,
    ZERO: tl.constexpr,
    SCALE_KIND: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_N: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK columns of one row of an eight-bit weight as numbers: out [width, depth]."""
    release_successor(PDL)
    row = tl.program_id(0)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = k < depth
    wait_for_predecessor(PDL)
    number = tl.load(weight + row.to(tl.int64) * depth + k, mask=inside, other=0.0).to(tl.float32)
    group = tl.minimum(k, depth - 1) // GROUP if GROUP > 0 else k * 0
    at = (row // GROUP_N) * groups + group
    if ZERO:
        number -= tl.load(zero + at).to(tl.float32)
    number *= exact_scale(tl.load(scale + at), SCALE_KIND)
    if ROW_SCALE:
        number *= tl.load(row_scale + row)
    tl.store(out + row.to(tl.int64) * depth + k, number.to(out.dtype.element_ty), mask=inside)
