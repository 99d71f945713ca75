"""x [M, K] times a 2:4 weight [N, K] transposed, read as it is kept: two numbers of each four, and where they
stood.

Groups of four neighbours are taken in slices of WORDS, four slices a span (`sparse_weight.SparseWeight`):
nibble J of word e says where the numbers of group J * WORDS + e of its span stand. The two numbers of a group
are one word of 32 bits; four numbers are one of 64, in which a position is a shift.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from backbench.backends.triton.gemm import prefetch_rows
from backbench.backends.triton.launch import release_successor, wait_for_predecessor
from backbench.backends.triton.packed_gemm import add_product, row_slice


@triton.jit
def number(bits, HALF: tl.constexpr):
    """f32 of the number in the low 16 bits: fp16 where HALF, else bf16."""
    if HALF:
        found = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        found = (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return found


@triton.jit
def four_numbers(pair, code):
    """A group's numbers, two of which are 0, in 64 bits: the first in the lowest ones.

    pair: the kept two in 32 bits; code: the position of the first in bits 0 and 1, of the second in 2 and 3.
    """
    first = (pair & 0xFFFF).to(tl.int64) << ((code & 3) * 16).to(tl.int64)
    second = ((pair >> 16) & 0xFFFF).to(tl.int64) << ((code >> 2) * 16).to(tl.int64)
    return first | second


@triton.jit
def expanded_tile(pair, code, like, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """[ROWS, 4 WORDS] numbers in `like`'s dtype of WORDS groups of every row, in their columns' order."""
    four = four_numbers(pair, code)
    n0 = four.to(tl.int16).to(like.dtype, bitcast=True)
    n1 = (four >> 16).to(tl.int16).to(like.dtype, bitcast=True)
    n2 = (four >> 32).to(tl.int16).to(like.dtype, bitcast=True)
    n3 = (four >> 48).to(tl.int16).to(like.dtype, bitcast=True)
    # The last axis is the lowest bit of a column's number, the one before it the next.
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (ROWS, 4 * WORDS))


@triton.jit
def position_words(positions, row, span, e, width, spans, WORDS: tl.constexpr):
    """Words e of rows and spans [rows, spans, words]; those past the last span are its own."""
    here = tl.minimum(span, spans - 1).to(tl.int64)
    place = (here[None, :] * width + row[:, None]) * WORDS
    word = tl.load(positions + place[:, :, None] + e[None, None, :], eviction_policy="evict_first")
    return word.to(tl.int32)


@triton.jit
def kept_pairs(rows, group, groups, EVEN: tl.constexpr):
    """The kept two of groups [spans, words] of every row [rows], 0 past the last group."""
    place = rows[:, None, None] + group[None, :, :]
    if EVEN:
        pair = tl.load(place, eviction_policy="evict_first")
    else:
        pair = tl.load(place, mask=(group < groups)[None, :, :], other=0, eviction_policy="evict_first")
    return pair


@triton.jit
def sparse_vector_kernel(
    x,
    values,
    positions,
    bias,
    out,
    width,
    groups,
    spans,
    BIAS: tl.constexpr,
    HALF: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPANS: tl.constexpr,
    EVEN: tl.constexpr,
    SINGLE: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_N of `width` outputs of one row x, int64 [groups] of four numbers, in fp32.

    SPANS spans are taken at a time, the first before the predecessor has finished. EVEN: groups are a
    multiple of theirs, no first load is masked. SINGLE: SPANS are all there are; else the next ones are
    loaded while these are used.
    """
    release_successor(PDL)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, width - 1)
    e = tl.arange(0, WORDS)[None, :]
    lane = tl.arange(0, SPANS)
    rows = values + row.to(tl.int64) * groups
    word = position_words(positions, row, lane, tl.arange(0, WORDS), width, spans, WORDS)
    group = (lane * (4 * WORDS))[:, None] + e
    p0 = kept_pairs(rows, group, groups, EVEN)
    p1 = kept_pairs(rows, group + WORDS, groups, EVEN)
    p2 = kept_pairs(rows, group + 2 * WORDS, groups, EVEN)
    p3 = kept_pairs(rows, group + 3 * WORDS, groups, EVEN)
    wait_for_predecessor(PDL)
    total = tl.zeros((BLOCK_N, SPANS, WORDS), tl.float32)
    for first in tl.range(0, spans, SPANS):
        group = ((first + lane) * (4 * WORDS))[:, None] + e
        word_after, q0, q1, q2, q3 = word, p0, p1, p2, p3
        if not SINGLE:
            after = group + SPANS * 4 * WORDS
            word_after = position_words(
                positions, row, first + SPANS + lane, tl.arange(0, WORDS), width, spans, WORDS
            )
            q0 = kept_pairs(rows, after, groups, False)
            q1 = kept_pairs(rows, after + WORDS, groups, False)
            q2 = kept_pairs(rows, after + 2 * WORDS, groups, False)
            q3 = kept_pairs(rows, after + 3 * WORDS, groups, False)
        total = add_groups(total, x, p0, word, group, groups, HALF, EVEN)
        total = add_groups(total, x, p1, word >> 4, group + WORDS, groups, HALF, EVEN)
        total = add_groups(total, x, p2, word >> 8, group + 2 * WORDS, groups, HALF, EVEN)
        total = add_groups(total, x, p3, word >> 12, group + 3 * WORDS, groups, HALF, EVEN)
        word, p0, p1, p2, p3 = word_after, q0, q1, q2, q3
    result = tl.sum(tl.sum(total, axis=2), axis=1)
    if BIAS:
        result += tl.load(bias + row).to(tl.float32)
    tl.store(out + n, result.to(out.dtype.element_ty), mask=n < width)


@triton.jit
def add_groups(total, x, pair, bits, group, groups, HALF: tl.constexpr, EVEN: tl.constexpr):
    """total + the products of groups [spans, words] of every row, each kept number by the x at its place."""
    if EVEN:
        four = tl.load(x + group)[None, :, :]
    else:
        four = tl.load(x + group, mask=group < groups, other=0)[None, :, :]
    one = number(four >> ((bits & 3) * 16).to(tl.int64), HALF)
    other = number(four >> (((bits >> 2) & 3) * 16).to(tl.int64), HALF)
    return total + number(pair, HALF) * one + number(pair >> 16, HALF) * other


@triton.jit(do_not_specialize=["count", "soon"])
def sparse_gemm_kernel(
    x,
    values,
    positions,
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
    WORDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr,
    SWAP: tl.constexpr,
    PARTIAL: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    WIDEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_N of `width` outputs of BLOCK_M of `count` rows of x [count, depth] on the matrix units, by the
    numbers of the weight with their zeros.

    Programs (tile, part): the blocks of rows by the same numbers are neighbours, so that these are read once.
    Part takes spans [part * split_spans, ...). PARTIAL: its fp32 sums go to out [part, count, width], which
    `finish_kernel` adds. The first `soon` tiles fetch the numbers of AHEAD spans while the predecessor still
    runs. EVEN: depth is a multiple of the span. SWAP, WIDEN: as in `packed_gemm_kernel`.
    """
    release_successor(PDL)
    tile, tiles_m = tl.program_id(0), tl.cdiv(count, BLOCK_M)
    m = (tile % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tile // tiles_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    row = tl.minimum(n, width - 1)
    e = tl.arange(0, WORDS)
    lane = tl.arange(0, 4 * WORDS)
    groups = depth // 4
    present = (m < count)[:, None]
    source = x + m.to(tl.int64)[:, None] * x_stride + lane[None, :]
    words = positions + row.to(tl.int64)[:, None] * WORDS + e[None, :]
    rows = values + row.to(tl.int64) * groups
    first = part * split_spans
    last = tl.minimum(spans, first + split_spans)
    if PDL and AHEAD > 0 and tile < soon:
        for step in tl.static_range(2 * AHEAD):  # two lines a span
            near = tl.minimum((first * 2 + step) * (2 * WORDS), groups - 1)
            prefetch_rows(rows + near, 1, 1)
    wait_for_predecessor(PDL)
    if SWAP:
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for span in tl.range(first, last, num_stages=STAGES):
        word = tl.load(words + tl.cast(span, tl.int64) * width * WORDS, eviction_policy="evict_first")
        word = word.to(tl.int32)
        for J in tl.static_range(4):
            group = (span * 4 + J) * WORDS
            value = row_slice(source, 4 * group, lane, present, depth, EVEN)
            place = rows[:, None] + (group + e)[None, :]
            if EVEN:
                pair = tl.load(place, eviction_policy="evict_first")
            else:
                inside = (group + e < groups)[None, :]
                pair = tl.load(place, mask=inside, other=0, eviction_policy="evict_first")
            weight = expanded_tile(pair, (word >> (4 * J)) & 15, value, BLOCK_N, WORDS)
            total = add_product(total, value, weight, SWAP, WIDEN)
    if SWAP:
        total = tl.trans(total)
    live = present & (n < width)[None, :]
    place = m.to(tl.int64)[:, None] * width + n[None, :]
    if PARTIAL:
        tl.store(out + part.to(tl.int64) * count * width + place, total, mask=live)
    else:
        if BIAS:
            total += tl.load(bias + row).to(tl.float32)[None, :]
        tl.store(out + place, total.to(out.dtype.element_ty), mask=live)


@triton.jit
def write_sparse_kernel(
    values,
    positions,
    out,
    width,
    groups,
    WORDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """One span of BLOCK_N rows with its zeros: out, int64 [width, groups] of four numbers."""
    release_successor(PDL)
    span = tl.program_id(0)
    row = tl.minimum(tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N), width - 1)
    e = tl.arange(0, WORDS)
    wait_for_predecessor(PDL)
    word = tl.load(positions + (span.to(tl.int64) * width + row)[:, None] * WORDS + e[None, :]).to(tl.int32)
    for J in tl.static_range(4):
        group = (span * 4 + J) * WORDS + e
        inside = (group < groups)[None, :]
        place = row.to(tl.int64)[:, None] * groups + group[None, :]
        pair = tl.load(values + place, mask=inside, other=0, eviction_policy="evict_first")
        tl.store(out + place, four_numbers(pair, (word >> (4 * J)) & 15), mask=inside)


@triton.jit
def cutlass_positions_kernel(
    positions,
    out,
    width,
    columns,
    WORDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """One span of BLOCK_N rows' positions where CUTLASS's sparse products want them: out, int16 [width *
    columns], a word for four groups, `columns` of them a row.

    The order is that of `reorder_meta` (cutlass/util/host_reorder.h): rows are interleaved 4 by 8 in each 32,
    blocks of 2 by 2 transposed, and two columns at a time stored one after the other.
    """
    release_successor(PDL)
    span = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, width - 1)
    e = tl.arange(0, WORDS)
    wait_for_predecessor(PDL)
    words = positions + (span.to(tl.int64) * width + row)[:, None] * WORDS
    # WORDS words hold as many of these: e takes four neighbouring groups, all in nibble e / (WORDS / 4).
    packed = tl.zeros((BLOCK_N, WORDS), tl.int32)
    for J in tl.static_range(4):
        word = tl.load(words + (4 * (e % (WORDS // 4)) + J)[None, :]).to(tl.int32)
        packed |= ((word >> (4 * (e // (WORDS // 4)))[None, :]) & 15) << (4 * J)
    column = (span * WORDS + e)[None, :]
    to = (row // 32 * 32 + row % 8 * 4 + row % 32 // 8)[:, None]
    swap = (to % 2 == 0).to(tl.int32) * (column % 2) - (to % 2) * (column % 2 == 0).to(tl.int32)
    to, column_to = to + swap, column - swap
    place = (column_to // 2).to(tl.int64) * width * 2 + to * 2 + column_to % 2
    live = (n < width)[:, None] & (column < columns)
    tl.store(out + place, packed.to(tl.int16), mask=live)
