"""x [M, K] times a four-bit weight [N, K] transposed, for few rows of x, where reading it is the work.

The weight is in words of four codes (`quantized_weight`): word e of a row's span of 4 W columns holds columns
e, W + e, 2 W + e and 3 W + e, so that a tile of words unpacks into four tiles of neighbouring columns. Spans
come first in memory: the words that the programs of one span read are one run.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from backbench.backends.triton.codes import code, exact_scale, scaled, unpacked
from backbench.backends.triton.gemm import finished, prefetch_rows
from backbench.backends.triton.launch import release_successor, wait_for_predecessor


@triton.jit
def word_tile(words, row, span, e, width, spans, WORDS: tl.constexpr):
    """Words e of rows and spans [rows, spans, words]; those past the last span are its own."""
    here = tl.minimum(span, spans - 1).to(tl.int64)
    place = (here[None, :] * width + row[:, None]) * WORDS
    return tl.load(words + place[:, :, None] + e[None, None, :], eviction_policy="evict_first")


@triton.jit
def tile_scale(
    scale,
    zero,
    row,
    k,
    width,
    depth,
    GROUP: tl.constexpr,
    ZERO: tl.constexpr,
    SCALE_KIND: tl.constexpr,
):
    """f32 scale (1 where one is for all columns) and int4 zero point of columns k [rows, columns]."""
    if GROUP == 0:
        at = (k * 0)[None, :] + row[:, None]
        step = tl.full(at.shape, 1.0, tl.float32)
    else:
        at = (tl.minimum(k, depth - 1) // GROUP)[None, :] * width + row[:, None]
        step = exact_scale(tl.load(scale + at), SCALE_KIND)
    if ZERO:
        middle = tl.load(zero + at).to(tl.float32)
    else:
        middle = tl.full(at.shape, 8.0, tl.float32)
    return step, middle


@triton.jit
def scaled_int4(bits, step, middle, J: tl.constexpr):
    """f32 numbers of code J of words, with scale and zero point [rows, spans].

    The code stands at the top of a mantissa whose exponent is 0, as 1 + code / UNIT; one multiply-add takes
    off the 1 and the zero point and scales. Its constant is exact for scales of 16 bits.
    """
    UNIT: tl.constexpr = 16 if J % 2 == 1 else 256
    MASK: tl.constexpr = 15 << 19 if J % 2 == 1 else 15 << 15
    up = bits << 15 if J < 2 else bits << 7
    number = ((up & MASK) | 0x3F800000).to(tl.float32, bitcast=True)
    offset = -(UNIT + middle) * step
    return number * (step * UNIT)[:, :, None] + offset[:, :, None]


@triton.jit
def packed_vector_kernel(
    x,
    words,
    scale,
    zero,
    row_scale,
    x_scale,
    bias,
    out,
    width,
    depth,
    spans,
    BIAS: tl.constexpr,
    ROW_SCALE: tl.constexpr,
    X_SCALE: tl.constexpr,
    ZERO: tl.constexpr,
    KIND: tl.constexpr,
    SCALE_KIND: tl.constexpr,
    GROUP: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPANS: tl.constexpr,
    SINGLE: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_N of `width` outputs of one row x [depth], SPANS spans of 4 WORDS columns at a time, in fp32.

    GROUP: columns that share a scale, 0 = all. SINGLE: SPANS are all there are; else the next words are
    loaded while these are used. Weights are exact numbers in fp32, rounded no further.
    """
    release_successor(PDL)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, width - 1)
    lane = tl.arange(0, SPANS)
    e = tl.arange(0, WORDS)
    SPAN: tl.constexpr = 4 * WORDS
    WHOLE: tl.constexpr = GROUP == 0 or GROUP % SPAN == 0
    tile = word_tile(words, row, lane, e, width, spans, WORDS)
    wait_for_predecessor(PDL)
    total = tl.zeros((BLOCK_N, SPANS, WORDS), tl.float32)
    for first in tl.range(0, spans, SPANS):
        span = first + lane
        following = tile
        if not SINGLE:
            following = word_tile(words, row, span + SPANS, e, width, spans, WORDS)
        bits = tile.to(tl.int32)
        start = tl.minimum(span, spans - 1) * SPAN
        step, middle = tile_scale(scale, zero, row, start, width, depth, GROUP, ZERO, SCALE_KIND)
        for J in tl.static_range(4):
            k = (span * SPAN)[:, None] + (J * WORDS + e)[None, :]
            value = tl.load(x + k, mask=k < depth, other=0.0).to(tl.float32)
            if not WHOLE and J > 0:
                step, middle = tile_scale(
                    scale, zero, row, start + J * WORDS, width, depth, GROUP, ZERO, SCALE_KIND
                )
            if KIND == "int4":
                number = scaled_int4(bits, step, middle, J)
            else:
                number = code(tile, J, KIND) * step[:, :, None]
            total += number * value[None, :, :]
        tile = following
    result = tl.sum(tl.sum(total, axis=2), axis=1)
    live = n < width
    if GROUP == 0:
        result *= exact_scale(tl.load(scale + row), SCALE_KIND)
    if ROW_SCALE:
        result *= tl.load(row_scale + row)
    if X_SCALE:
        result *= tl.load(x_scale)
    if BIAS:
        result += tl.load(bias + row).to(tl.float32)
    tl.store(out + n, result.to(out.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["count", "soon"])
def packed_gemm_kernel(
    x,
    words,
    scale,
    zero,
    row_scale,
    x_scale,
    bias,
    out,
    count,
    width,
    depth,
    spans,
    x_stride,
    split_spans,
    soon,
    BIAS: tl.constexpr,
    ROW_SCALE: tl.constexpr,
    X_SCALE: tl.constexpr,
    ZERO_GROUP: tl.constexpr,
    KIND: tl.constexpr,
    SCALE_KIND: tl.constexpr,
    GROUP: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr,
    SWAP: tl.constexpr,
    EARLY: tl.constexpr,
    PARTIAL: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    PTX: tl.constexpr,
    WAIT: tl.constexpr,
    WIDEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_N of `width` outputs of BLOCK_M of `count` rows of x [count, depth] on the matrix units.

    Program (n, m, part) takes spans [part * split_spans, ...). PARTIAL: its fp32 sums go to out [part, count,
    width] without scale of the whole row, bias and so on, which `finish_kernel` adds.
    The first `soon` programs fetch the words of AHEAD spans while the predecessor still runs.
    ZERO_GROUP: columns that share a zero point, 0 = there is none; very many = all.
    EARLY: each code is scaled in x's dtype before it is multiplied, as if the weight had been dequantized;
    else sums of a group are scaled in fp32. EVEN: depth is a multiple of the span. WAIT: of
    `finished`. WIDEN: the interpreter multiplies bf16 wrongly, so operands are cast up there.
    """
    release_successor(PDL)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(2)
    row = tl.minimum(n, width - 1)
    e = tl.arange(0, WORDS)
    present = (m < count)[:, None]
    source = x + m.to(tl.int64)[:, None] * x_stride + e[None, :]
    rows = words + row.to(tl.int64)[:, None] * WORDS + e[None, :]
    SPAN: tl.constexpr = 4 * WORDS
    # Sums of a group that holds whole spans are scaled once a span.
    WHOLE: tl.constexpr = GROUP == 0 or GROUP % SPAN == 0
    first = part * split_spans
    last = tl.minimum(spans, first + split_spans)
    if PDL and AHEAD > 0 and tl.program_id(0) < soon:
        for step in tl.static_range(AHEAD):
            near = tl.minimum(first + step, spans - 1).to(tl.int64)
            prefetch_rows(words + (near * width + row) * WORDS, WORDS, 1)
    wait_for_predecessor(PDL)
    if SWAP:
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # The next span's scales arrive while this one is multiplied.
    s0, s1, s2, s3 = span_of(scale, row, width, depth, first, SPAN, GROUP)
    z0, z1, z2, z3 = span_of(zero, row, width, depth, first, SPAN, ZERO_GROUP)
    for span in tl.range(first, last, num_stages=STAGES):
        word = tl.load(rows + tl.cast(span, tl.int64) * width * WORDS, eviction_policy="evict_first")
        t0, t1, t2, t3 = span_of(scale, row, width, depth, span + 1, SPAN, GROUP)
        y0, y1, y2, y3 = span_of(zero, row, width, depth, span + 1, SPAN, ZERO_GROUP)
        group0, group1 = exact_scale(s0, SCALE_KIND), exact_scale(s1, SCALE_KIND)
        group2, group3 = exact_scale(s2, SCALE_KIND), exact_scale(s3, SCALE_KIND)
        zero0, zero1 = zero_point(z0, ZERO_GROUP, KIND), zero_point(z1, ZERO_GROUP, KIND)
        zero2, zero3 = zero_point(z2, ZERO_GROUP, KIND), zero_point(z3, ZERO_GROUP, KIND)
        x0 = row_slice(source, span * SPAN, e, present, depth, EVEN)
        x1 = row_slice(source, span * SPAN + WORDS, e, present, depth, EVEN)
        x2 = row_slice(source, span * SPAN + 2 * WORDS, e, present, depth, EVEN)
        x3 = row_slice(source, span * SPAN + 3 * WORDS, e, present, depth, EVEN)
        w0, w1, w2, w3 = unpacked(word, zero0, zero1, zero2, zero3, x0, KIND, PTX)
        if EARLY:
            w0, w1, w2, w3 = scaled(w0, w1, w2, w3, group0, group1, group2, group3, PTX)
            total = add_product(total, x0, w0, SWAP, WIDEN)
            total = add_product(total, x1, w1, SWAP, WIDEN)
            total = add_product(total, x2, w2, SWAP, WIDEN)
            total = finished(add_product(total, x3, w3, SWAP, WIDEN), WAIT)
        elif GROUP == 0:
            total = add_product(total, x0, w0, SWAP, WIDEN)
            total = add_product(total, x1, w1, SWAP, WIDEN)
            total = add_product(total, x2, w2, SWAP, WIDEN)
            total = finished(add_product(total, x3, w3, SWAP, WIDEN), WAIT)
        elif WHOLE:
            some = add_product(tl.zeros_like(total), x0, w0, SWAP, WIDEN)
            some = add_product(some, x1, w1, SWAP, WIDEN)
            some = add_product(some, x2, w2, SWAP, WIDEN)
            some = add_product(some, x3, w3, SWAP, WIDEN)
            total += some * along(group0, SWAP)
        else:
            total += add_product(tl.zeros_like(total), x0, w0, SWAP, WIDEN) * along(group0, SWAP)
            total += add_product(tl.zeros_like(total), x1, w1, SWAP, WIDEN) * along(group1, SWAP)
            total += add_product(tl.zeros_like(total), x2, w2, SWAP, WIDEN) * along(group2, SWAP)
            total += add_product(tl.zeros_like(total), x3, w3, SWAP, WIDEN) * along(group3, SWAP)
        s0, s1, s2, s3, z0, z1, z2, z3 = t0, t1, t2, t3, y0, y1, y2, y3
    if SWAP:
        total = tl.trans(total)
    live = present & (n < width)[None, :]
    place = m.to(tl.int64)[:, None] * width + n[None, :]
    if PARTIAL:
        tl.store(out + part.to(tl.int64) * count * width + place, total, mask=live)
    else:
        if GROUP == 0:
            total *= exact_scale(tl.load(scale + row), SCALE_KIND)[None, :]
        if ROW_SCALE:
            total *= tl.load(row_scale + row)[None, :]
        if X_SCALE:
            total *= tl.load(x_scale + m, mask=m < count, other=0.0)[:, None]
        if BIAS:
            total += tl.load(bias + row).to(tl.float32)[None, :]
        tl.store(out + place, total.to(out.dtype.element_ty), mask=live)


@triton.jit
def span_of(groups, row, width, depth, span, SPAN: tl.constexpr, GROUP: tl.constexpr):
    """What is stored of every row's groups [rows] for a span's four slices; those past the end repeat."""
    if GROUP == 0:
        first = row
    else:
        first = stored_group(groups, row, width, depth, span * SPAN, GROUP)
    if GROUP % SPAN == 0:
        found = first, first, first, first
    else:
        second = stored_group(groups, row, width, depth, span * SPAN + SPAN // 4, GROUP)
        third = stored_group(groups, row, width, depth, span * SPAN + SPAN // 2, GROUP)
        fourth = stored_group(groups, row, width, depth, span * SPAN + SPAN // 4 * 3, GROUP)
        found = first, second, third, fourth
    return found


@triton.jit
def stored_group(groups, row, width, depth, k, GROUP: tl.constexpr):
    """What is stored of every row's group that holds column k, or the last one."""
    return tl.load(groups + (tl.minimum(k, depth - 1) // GROUP) * width + row)


@triton.jit
def zero_point(stored, ZERO_GROUP: tl.constexpr, KIND: tl.constexpr):
    """f32 code that means 0: stored, or 8 of int4."""
    if ZERO_GROUP > 0:
        found = stored.to(tl.float32)
    else:
        found = tl.full(stored.shape, 8.0 if KIND == "int4" else 0.0, tl.float32)
    return found


@triton.jit
def row_slice(source, k, e, present, depth, EVEN: tl.constexpr):
    """Columns k + e of the rows at `source`."""
    inside = present if EVEN else present & (k + e < depth)[None, :]
    return tl.load(source + k, mask=inside, other=0.0)


@triton.jit
def add_product(total, x, w, SWAP: tl.constexpr, WIDEN: tl.constexpr):
    """total + x [m, k] by w [n, k] transposed; SWAP: `total` and the product are transposed."""
    if WIDEN:
        x = x.to(tl.float32)
        w = w.to(tl.float32)
    if SWAP:
        total = tl.dot(w, tl.trans(x), total, input_precision="ieee")
    else:
        total = tl.dot(x, tl.trans(w), total, input_precision="ieee")
    return total


@triton.jit
def along(scale, SWAP: tl.constexpr):
    """A scale of every output beside the sums."""
    if SWAP:
        beside = scale[:, None]
    else:
        beside = scale[None, :]
    return beside
