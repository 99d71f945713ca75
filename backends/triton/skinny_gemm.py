"""x [M, K] times weight [N, K] transposed for few rows of x, where reading the weight is all the work.

Two kernels stream the weight once: a matrix-vector product with fp32 multiply-adds (M = 1), and a product on
the matrix units with x padded to a small tile (M up to a few dozen). Both can gate and add a residual on the
way out, and the first can norm x on the way in, so that a decoder layer at batch 1 needs few launches.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from backends.triton.gate import silu
from backends.triton.launch import release_successor, wait_for_predecessor

LINE = tl.constexpr(64)
"""16-bit elements in a cache line of 128 bytes."""


@triton.jit
def prefetch(pointers):
    """Fetch the cache lines that hold `pointers` into L2 (PTX only; nothing waits for them)."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def prefetch_rows(rows, width, LINES: tl.constexpr):
    """Prefetch the first LINES cache lines of every row."""
    element = tl.minimum(tl.arange(0, LINES) * LINE, width - 1)
    prefetch(rows[:, None] + element[None, :])


@triton.jit
def weight_tile(rows, k, depth, EVEN: tl.constexpr):
    """weight[rows, k], zero where k lies past `depth`; read once, so first to leave the cache."""
    if EVEN:
        tile = tl.load(rows[:, None] + k[None, :], eviction_policy="evict_first")
    else:
        inside = (k < depth)[None, :]
        tile = tl.load(rows[:, None] + k[None, :], mask=inside, other=0.0, eviction_policy="evict_first")
    return tile


@triton.jit
def following_tile(rows, k, depth):
    """weight[rows, k] without touching memory past the last column."""
    inside = (k < depth)[None, :]
    return tl.load(rows[:, None] + k[None, :], mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def matrix_vector_kernel(
    x,
    weight,
    bias,
    norm_weight,
    residual,
    out,
    width,
    depth,
    eps,
    NORM: tl.constexpr,
    GATE: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_N of `width` outputs of one row x [depth], in fp32.

    NORM: x is RMS-normed by `norm_weight`; its scale is one factor, applied to the finished sums.
    GATE: the weight has 2 * width rows, the output is silu(first half) * second half.
    EVEN: depth is a multiple of BLOCK_K, no load is masked. STAGES 1: the next tile is loaded into
    registers while this one is used, the first one before the predecessor has finished; more: tiles go
    through shared memory.
    """
    AHEAD: tl.constexpr = STAGES == 1
    release_successor(PDL)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_K)
    rows = weight + tl.minimum(n, width - 1).to(tl.int64) * depth
    second = weight + (tl.minimum(n, width - 1) + width).to(tl.int64) * depth
    if AHEAD:
        tile = weight_tile(rows, lane, depth, EVEN)
        if GATE:
            paired = weight_tile(second, lane, depth, EVEN)
    wait_for_predecessor(PDL)
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    gated = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    for start in tl.range(0, depth, BLOCK_K, num_stages=STAGES):
        k = start + lane
        if EVEN:
            value = tl.load(x + k).to(tl.float32)
        else:
            value = tl.load(x + k, mask=k < depth, other=0.0).to(tl.float32)
        if NORM:
            squares += value * value
            value *= tl.load(norm_weight + k, mask=k < depth, other=0.0).to(tl.float32)
        if AHEAD:
            following = following_tile(rows, k + BLOCK_K, depth)
        else:
            tile = weight_tile(rows, k, depth, EVEN)
        if GATE:
            if AHEAD:
                following_paired = following_tile(second, k + BLOCK_K, depth)
            else:
                paired = weight_tile(second, k, depth, EVEN)
            gated += paired.to(tl.float32) * value[None, :]
        total += tile.to(tl.float32) * value[None, :]
        if AHEAD:
            tile = following
            if GATE:
                paired = following_paired
    scale = 1.0
    if NORM:
        scale = 1.0 / tl.sqrt_rn(tl.sum(squares, axis=0) / depth + eps)
    result = tl.sum(total, axis=1) * scale
    inside = n < width
    if BIAS:
        result += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    if GATE:
        other = tl.sum(gated, axis=1) * scale
        if BIAS:
            other += tl.load(bias + width + n, mask=inside, other=0.0).to(tl.float32)
        result = silu(result) * other
    if RESIDUAL:
        result += tl.load(residual + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + n, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def product(x, tile, total, SWAP: tl.constexpr, WIDEN: tl.constexpr):
    """total + x tile^T; with SWAP everything is transposed, so that the weight is the wide operand.

    WIDEN: the interpreter multiplies bf16 wrongly, so operands are cast up there.
    """
    if WIDEN:
        x = x.to(tl.float32)
        tile = tile.to(tl.float32)
    if SWAP:
        total = tl.dot(tile, tl.trans(x), total, input_precision="ieee")
    else:
        total = tl.dot(x, tl.trans(tile), total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["count", "early"])
def skinny_gemm_kernel(
    x,
    weight,
    bias,
    residual,
    out,
    count,
    width,
    depth,
    x_stride,
    early,
    GATE: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    SWAP: tl.constexpr,
    STAGES: tl.constexpr,
    LINES: tl.constexpr,
    WIDEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_N of `width` outputs of `count` rows of x [count, depth], fp32 sums on the matrix units.

    See `matrix_vector_kernel` for the flags. Rows past `count` repeat the last one and are not stored.
    The first `early` programs fetch LINES cache lines of each of their rows while the predecessor still runs.
    """
    release_successor(PDL)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_K)
    rows = weight + tl.minimum(n, width - 1).to(tl.int64) * depth
    second = weight + (tl.minimum(n, width - 1) + width).to(tl.int64) * depth
    source = x + tl.minimum(m, count - 1).to(tl.int64) * x_stride
    if PDL and LINES > 0 and tl.program_id(0) < early:
        prefetch_rows(rows, depth, LINES)
        if GATE:
            prefetch_rows(second, depth, LINES)
    wait_for_predecessor(PDL)
    SHAPE_M: tl.constexpr = BLOCK_N if SWAP else BLOCK_M
    SHAPE_N: tl.constexpr = BLOCK_M if SWAP else BLOCK_N
    total = tl.zeros((SHAPE_M, SHAPE_N), tl.float32)
    gated = tl.zeros((SHAPE_M, SHAPE_N), tl.float32)
    for start in tl.range(0, depth, BLOCK_K, num_stages=STAGES):
        k = start + lane
        if EVEN:
            value = tl.load(source[:, None] + k[None, :])
        else:
            value = tl.load(source[:, None] + k[None, :], mask=(k < depth)[None, :], other=0.0)
        tile = weight_tile(rows, k, depth, EVEN)
        total = product(value, tile, total, SWAP, WIDEN)
        if GATE:
            tile = weight_tile(second, k, depth, EVEN)
            gated = product(value, tile, gated, SWAP, WIDEN)
    if SWAP:
        total = tl.trans(total)
        gated = tl.trans(gated)
    live = n < width
    if BIAS:
        total += tl.load(bias + n, mask=live, other=0.0).to(tl.float32)[None, :]
    if GATE:
        if BIAS:
            gated += tl.load(bias + width + n, mask=live, other=0.0).to(tl.float32)[None, :]
        total = silu(total) * gated
    mask = (m < count)[:, None] & live[None, :]
    place = m.to(tl.int64)[:, None] * width + n[None, :]
    if RESIDUAL:
        total += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=mask)
