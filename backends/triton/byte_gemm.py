"""x [M, K] times an eight-bit weight [N, K] transposed: int8 or fp8 (e4m3) codes, as they stand in a row.

Rows of x are codes of the same kind beside their scales, where the scheme rounds them (`rounding`), else
16-bit floats. Codes of both are multiplied as they are where the GPU has instructions for it (NATIVE), else
as bf16 or fp16, which hold both kinds exactly.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from backbench.backends.triton.codes import exact_scale
from backbench.backends.triton.gemm import finished, prefetch_rows
from backbench.backends.triton.launch import release_successor, wait_for_predecessor


@triton.jit
def exact(codes):
    """f32 of int8 or fp8 codes and of 16-bit floats. An integer is added to 1.5 * 2^23, bit for bit."""
    if codes.dtype == tl.int8:
        number = (codes.to(tl.int32) + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0
    else:
        number = codes.to(tl.float32)
    return number


@triton.jit
def byte_tile(rows, k, depth, EVEN: tl.constexpr):
    """Codes [rows, spans, columns]; 0 where k lies past `depth`."""
    place = rows[:, None, None] + k[None, :, :]
    if EVEN:
        tile = tl.load(place, eviction_policy="evict_first")
    else:
        tile = tl.load(place, mask=(k < depth)[None, :, :], other=0.0, eviction_policy="evict_first")
    return tile


@triton.jit
def byte_vector_kernel(
    x,
    weight,
    scale,
    zero,
    row_scale,
    x_scale,
    bias,
    out,
    width,
    depth,
    groups,
    BIAS: tl.constexpr,
    ROW_SCALE: tl.constexpr,
    X_SCALE: tl.constexpr,
    ZERO: tl.constexpr,
    SCALE_KIND: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_N: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPANS: tl.constexpr,
    EVEN: tl.constexpr,
    SINGLE: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_N of `width` outputs of one row x [depth], SPANS spans of SPAN columns at a time, in fp32.

    GROUP: columns that share a scale, 0 = all; else SPAN divides it. EVEN: depth is a multiple of all these
    columns, so the first load is not masked. SINGLE: there are no more. X_SCALE "row": one scale; "group":
    one for every 128 columns; "none".
    """
    release_successor(PDL)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, width - 1)
    lane = tl.arange(0, SPANS)
    e = tl.arange(0, SPAN)
    rows = weight + row.to(tl.int64) * depth
    k = lane[:, None] * SPAN + e[None, :]
    tile = byte_tile(rows, k, depth, EVEN)
    wait_for_predecessor(PDL)
    total = tl.zeros((BLOCK_N, SPANS, SPAN), tl.float32)
    for first in tl.range(0, depth, SPANS * SPAN):
        k = first + lane[:, None] * SPAN + e[None, :]
        following = tile
        if not SINGLE:
            following = byte_tile(rows, k + SPANS * SPAN, depth, False)
        if EVEN:
            value = exact(tl.load(x + k))
        else:
            value = exact(tl.load(x + k, mask=k < depth, other=0.0))
        number = exact(tile)
        if X_SCALE == "group":
            start = first + lane * SPAN
            value *= tl.load(x_scale + start // 128, mask=start < depth, other=0.0)[:, None]
        if GROUP > 0:
            group = tl.minimum((first + lane * SPAN) // GROUP, groups - 1)
            at = (row // GROUP_N)[:, None] * groups + group[None, :]
            if ZERO:
                number -= tl.load(zero + at).to(tl.float32)[:, :, None]
            if GROUP_N % BLOCK_N == 0:
                # One block of rows: its scales multiply x.
                block = (tl.program_id(0) * BLOCK_N) // GROUP_N
                value *= exact_scale(tl.load(scale + block * groups + group), SCALE_KIND)[:, None]
            else:
                number *= exact_scale(tl.load(scale + at), SCALE_KIND)[:, :, None]
        elif ZERO:
            number -= tl.load(zero + row // GROUP_N).to(tl.float32)[:, None, None]
        total += number * value[None, :, :]
        tile = following
    result = tl.sum(tl.sum(total, axis=2), axis=1)
    if GROUP == 0:
        result *= exact_scale(tl.load(scale + row // GROUP_N), SCALE_KIND)
    if ROW_SCALE:
        result *= tl.load(row_scale + row)
    if X_SCALE == "row":
        result *= tl.load(x_scale)
    if BIAS:
        result += tl.load(bias + row).to(tl.float32)
    tl.store(out + n, result.to(out.dtype.element_ty), mask=n < width)


@triton.jit(do_not_specialize=["count", "soon"])
def byte_gemm_kernel(
    x,
    weight,
    scale,
    zero,
    row_scale,
    x_scale,
    bias,
    out,
    count,
    width,
    depth,
    groups,
    x_stride,
    split_depth,
    soon,
    BIAS: tl.constexpr,
    ROW_SCALE: tl.constexpr,
    X_SCALE: tl.constexpr,
    ZERO: tl.constexpr,
    SCALE_KIND: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    SWAP: tl.constexpr,
    PARTIAL: tl.constexpr,
    BAND: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    NATIVE: tl.constexpr,
    HALF: tl.constexpr,
    WAIT: tl.constexpr,
    WIDEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_N of `width` outputs of BLOCK_M of `count` rows of x [count, depth] on the matrix units.

    Programs (tile, part): tiles of BAND blocks of rows are neighbours, so that their weights and rows stay in
    the cache. Part takes columns [part * split_depth, ...). PARTIAL: fp32 sums go to out [part, count, width]
    without the scales of whole rows and the bias, which `finish_kernel` adds. The first `soon`
    tiles fetch AHEAD lines of each row while the predecessor still runs. GROUP, GROUP_N, X_SCALE: as in
    `byte_vector_kernel`, BLOCK_K dividing GROUP and the row's groups of 128. WAIT: of `finished`.
    """
    release_successor(PDL)
    tiles_m = tl.cdiv(count, BLOCK_M)
    tiles_n = tl.cdiv(width, BLOCK_N)
    tile = tl.program_id(0)
    band = tile // (BAND * tiles_n)
    high = tl.minimum(tiles_m - band * BAND, BAND)
    within = tile % (BAND * tiles_n)
    m = (band * BAND + within % high) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (within // high) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    row = tl.minimum(n, width - 1)
    lane = tl.arange(0, BLOCK_K)
    present = (m < count)[:, None]
    source = x + m.to(tl.int64)[:, None] * x_stride + lane[None, :]
    rows = weight + row.to(tl.int64)[:, None] * depth + lane[None, :]
    # Sums of int8 codes are exact in 32 bits; scales of groups make floats of them.
    SCALED: tl.constexpr = GROUP > 0 or X_SCALE == "group"
    INTEGER: tl.constexpr = NATIVE and weight.dtype.element_ty == tl.int8
    SUMS: tl.constexpr = tl.int32 if INTEGER and not SCALED else tl.float32
    if PDL and AHEAD > 0 and tile < soon:
        prefetch_rows(weight + row.to(tl.int64) * depth + part * split_depth, depth, 2 * AHEAD)
    wait_for_predecessor(PDL)
    if SWAP:
        total = tl.zeros((BLOCK_N, BLOCK_M), SUMS)
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), SUMS)
    last = tl.minimum(depth, (part + 1) * split_depth)
    for k in tl.range(part * split_depth, last, BLOCK_K, num_stages=STAGES):
        if EVEN:
            value = tl.load(source + k, mask=present, other=0.0)
            codes = tl.load(rows + k, eviction_policy="evict_first" if BLOCK_M <= 64 else "")
        else:
            inside = (k + lane < depth)[None, :]
            value = tl.load(source + k, mask=present & inside, other=0.0)
            codes = tl.load(rows + k, mask=inside, other=0.0)
        if ZERO:
            group = k // GROUP if GROUP > 0 else 0
            middle = tl.load(zero + (row // GROUP_N) * groups + group)
            codes = exact(codes) - middle.to(tl.float32)[:, None]
        if not NATIVE:
            NUMBER: tl.constexpr = tl.float32 if WIDEN else (tl.float16 if HALF else tl.bfloat16)
            value = value.to(tl.float32).to(NUMBER)
            codes = codes.to(tl.float32).to(NUMBER)
        if SCALED:
            if INTEGER:
                some = byte_product(value, codes, tl.zeros(total.shape, tl.int32), SWAP).to(tl.float32)
            else:
                some = byte_product(value, codes, tl.zeros(total.shape, tl.float32), SWAP)
            step = tl.full((BLOCK_N,), 1.0, tl.float32)
            if GROUP > 0:
                at = (row // GROUP_N) * groups + k // GROUP
                step = exact_scale(tl.load(scale + at), SCALE_KIND)
            own = tl.full((BLOCK_M,), 1.0, tl.float32)
            if X_SCALE == "group":
                own = tl.load(x_scale + m * tl.cdiv(depth, 128) + k // 128, mask=m < count, other=0.0)
            if SWAP:
                total += some * step[:, None] * own[None, :]
            else:
                total += some * own[:, None] * step[None, :]
        else:
            total = finished(byte_product(value, codes, total, SWAP), WAIT)
    if SWAP:
        total = tl.trans(total)
    live = present & (n < width)[None, :]
    place = m.to(tl.int64)[:, None] * width + n[None, :]
    total = total.to(tl.float32)
    if PARTIAL:
        tl.store(out + part.to(tl.int64) * count * width + place, total, mask=live)
    else:
        if GROUP == 0:
            total *= exact_scale(tl.load(scale + row // GROUP_N), SCALE_KIND)[None, :]
        if ROW_SCALE:
            total *= tl.load(row_scale + row)[None, :]
        if X_SCALE == "row":
            total *= tl.load(x_scale + m, mask=m < count, other=0.0)[:, None]
        if BIAS:
            total += tl.load(bias + row).to(tl.float32)[None, :]
        tl.store(out + place, total.to(out.dtype.element_ty), mask=live)


@triton.jit
def byte_product(x, w, total, SWAP: tl.constexpr):
    """total + x [m, k] by w [n, k] transposed; SWAP: `total` and the product are transposed.

    fp8 sums leave the matrix unit, which keeps 14 bits of them on sm90, after every step.
    """
    if SWAP:
        one, other = w, tl.trans(x)
    else:
        one, other = x, tl.trans(w)
    if total.dtype == tl.int32:
        total = tl.dot(one, other, total, out_dtype=tl.int32)
    else:
        total = tl.dot(one, other, total, input_precision="ieee", max_num_imprecise_acc=x.shape[1])
    return total
