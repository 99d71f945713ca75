"""x [M, K] times weight [N, K] transposed for few rows of x, where reading the weight is all the work.

Three kernels stream the weight once: a matrix-vector product with fp32 multiply-adds (M = 1), a product on
the matrix units with x padded to a small tile (M up to a few dozen), and the same with K cut into parts. All
begin to fetch their weights before the previous kernel has finished, so that one product's tail hides the
next one's start.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from backbench.backends.triton.configs import GemmConfig
from backbench.backends.triton.launch import (
    BoundKernel,
    Launch,
    Place,
    parts,
    place_of,
    release_successor,
    wait_for_predecessor,
)

LINE = tl.constexpr(64)
"""16-bit elements in a cache line of 128 bytes."""


@triton.jit
def prefetch_rows(rows, width, LINES: tl.constexpr):
    """Fetch the first LINES cache lines of every row into L2 (PTX only; nothing waits for them)."""
    element = tl.minimum(tl.arange(0, LINES) * LINE, width - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [(rows[:, None] + element[None, :]).to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def finished(total, WAIT: tl.constexpr):
    """A loop's sum, of products that have ended: no instruction reads it here, but Triton waits for them.

    WAIT: a product takes an operand from registers and runs on (Hopper's wgmma). Triton would let it run into
    the next step, and ptxas before 13.3 then gives the registers that it still reads to the numbers of that
    step (triton-lang/triton#9433), so that now and then results are wrong by any amount.
    """
    if WAIT:
        total = tl.inline_asm_elementwise("", "=f,0", [total], dtype=tl.float32, is_pure=True, pack=1)
    return total


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
def matrix_vector_kernel(
    x,
    weight,
    bias,
    out,
    width,
    depth,
    BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_N of `width` outputs of one row x [depth], in fp32.

    EVEN: depth is a multiple of BLOCK_K, no load is masked. STAGES 1: the next tile is loaded into
    registers while this one is used, the first one before the predecessor has finished; more: tiles go
    through shared memory.
    """
    AHEAD: tl.constexpr = STAGES == 1
    release_successor(PDL)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_K)
    rows = weight + tl.minimum(n, width - 1).to(tl.int64) * depth
    if AHEAD:
        tile = weight_tile(rows, lane, depth, EVEN)
    wait_for_predecessor(PDL)
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in tl.range(0, depth, BLOCK_K, num_stages=STAGES):
        k = start + lane
        if EVEN:
            value = tl.load(x + k).to(tl.float32)
        else:
            value = tl.load(x + k, mask=k < depth, other=0.0).to(tl.float32)
        if AHEAD:
            following = weight_tile(rows, k + BLOCK_K, depth, False)
        else:
            tile = weight_tile(rows, k, depth, EVEN)
        total += tile.to(tl.float32) * value[None, :]
        if AHEAD:
            tile = following
    result = tl.sum(total, axis=1)
    inside = n < width
    if BIAS:
        result += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + n, result.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count", "early"])
def skinny_gemm_kernel(
    x,
    weight,
    bias,
    out,
    count,
    width,
    depth,
    x_stride,
    early,
    BIAS: tl.constexpr,
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

    SWAP: the weight is the wide operand and the result is transposed. The first `early` programs fetch
    LINES cache lines of each of their rows while the predecessor still runs. WIDEN: the interpreter
    multiplies bf16 wrongly, so operands are cast up there.
    """
    release_successor(PDL)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_K)
    rows = weight + tl.minimum(n, width - 1).to(tl.int64) * depth
    source = x + m.to(tl.int64) * x_stride
    # Rows past `count` are not read: every program asking for the same line again makes one L2 slice wait.
    present = (m < count)[:, None]
    if PDL and LINES > 0 and tl.program_id(0) < early:
        prefetch_rows(rows, depth, LINES)
    wait_for_predecessor(PDL)
    SHAPE_M: tl.constexpr = BLOCK_N if SWAP else BLOCK_M
    SHAPE_N: tl.constexpr = BLOCK_M if SWAP else BLOCK_N
    total = tl.zeros((SHAPE_M, SHAPE_N), tl.float32)
    for start in tl.range(0, depth, BLOCK_K, num_stages=STAGES):
        k = start + lane
        inside = present if EVEN else present & (k < depth)[None, :]
        value = tl.load(source[:, None] + k[None, :], mask=inside, other=0.0)
        tile = weight_tile(rows, k, depth, EVEN)
        if WIDEN:
            value = value.to(tl.float32)
            tile = tile.to(tl.float32)
        if SWAP:
            total = tl.dot(tile, tl.trans(value), total, input_precision="ieee")
        else:
            total = tl.dot(value, tl.trans(tile), total, input_precision="ieee")
    if SWAP:
        total = tl.trans(total)
    live = n < width
    if BIAS:
        total += tl.load(bias + n, mask=live, other=0.0).to(tl.float32)[None, :]
    place = m.to(tl.int64)[:, None] * width + n[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=present & live[None, :])


@triton.jit(do_not_specialize=["count", "early"])
def split_gemm_kernel(
    x,
    weight,
    bias,
    out,
    count,
    width,
    depth,
    x_stride,
    early,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
    SWAP: tl.constexpr,
    STAGES: tl.constexpr,
    LINES: tl.constexpr,
    WIDEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """`skinny_gemm_kernel` with every BLOCK_K columns cut into SPLIT parts that have sums of their own.

    A tile of one matrix instruction is one chain of dependent instructions over K, and each warp computes
    all of it: on an H100, 1,024 outputs of 5 rows and 3,072 columns wait 2 us for it. Parts are chains that
    run side by side, on different warps.
    """
    release_successor(PDL)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    SPAN: tl.constexpr = BLOCK_K // SPLIT
    lane = tl.arange(0, SPLIT)[:, None] * SPAN + tl.arange(0, SPAN)[None, :]
    rows = weight + tl.minimum(n, width - 1).to(tl.int64) * depth
    source = x + m.to(tl.int64) * x_stride
    present = m < count
    if PDL and LINES > 0 and tl.program_id(0) < early:
        prefetch_rows(rows, depth, LINES)
    wait_for_predecessor(PDL)
    SHAPE_M: tl.constexpr = BLOCK_N if SWAP else BLOCK_M
    SHAPE_N: tl.constexpr = BLOCK_M if SWAP else BLOCK_N
    total = tl.zeros((SPLIT, SHAPE_M, SHAPE_N), tl.float32)
    for start in tl.range(0, depth, BLOCK_K, num_stages=STAGES):
        k = (start + lane)[:, None, :]
        if EVEN:
            value = tl.load(source[None, :, None] + k, mask=present[None, :, None], other=0.0)
            tile = tl.load(rows[None, :, None] + k, eviction_policy="evict_first")
        else:
            inside = k < depth
            value = tl.load(source[None, :, None] + k, mask=present[None, :, None] & inside, other=0.0)
            tile = tl.load(rows[None, :, None] + k, mask=inside, other=0.0, eviction_policy="evict_first")
        if WIDEN:
            value = value.to(tl.float32)
            tile = tile.to(tl.float32)
        if SWAP:
            total = tl.dot(tile, tl.permute(value, (0, 2, 1)), total, input_precision="ieee")
        else:
            total = tl.dot(value, tl.permute(tile, (0, 2, 1)), total, input_precision="ieee")
    result = tl.sum(total, axis=0)
    if SWAP:
        result = tl.trans(result)
    live = n < width
    if BIAS:
        result += tl.load(bias + n, mask=live, other=0.0).to(tl.float32)[None, :]
    place = m.to(tl.int64)[:, None] * width + n[None, :]
    tl.store(out + place, result.to(out.dtype.element_ty), mask=present[:, None] & live[None, :])


@cache
def _bound_product(place: Place, config: GemmConfig, bias: bool, even: bool) -> BoundKernel:
    shared = {
        "BIAS": bias,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "EVEN": even,
        "STAGES": config.stages,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }
    if config.block_m == 0:
        return place.bind(matrix_vector_kernel, **shared)
    shared |= {"BLOCK_M": config.block_m, "LINES": config.lines, "SWAP": config.swap}
    shared |= {"WIDEN": place.interpreted}
    if config.split > 1:
        return place.bind(split_gemm_kernel, SPLIT=config.split, **shared)
    return place.bind(skinny_gemm_kernel, **shared)


def product_launch(
    place: Place, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, config: GemmConfig
) -> Launch:
    """`out` [M, N] = x [M, K] with unit column stride by weight [N, K] transposed, plus bias [N]."""
    rows, depth = x.shape
    width = weight.shape[0]
    bound = _bound_product(place, config, bias is not None, depth % config.block_k == 0)
    bias = x if bias is None else bias
    columns = parts(width, config.block_n)
    if config.block_m == 0:
        return Launch(bound, (columns, 1, 1), (x, weight, bias, out, width, depth))
    arguments = (x, weight, bias, out, rows, width, depth, x.stride(0), 2 * place.units)
    return Launch(bound, (columns, parts(rows, config.block_m), 1), arguments)


def multiply(x: Tensor, weight: Tensor, config: GemmConfig, bias: Tensor | None = None) -> Tensor:
    """x [M, K] by weight [N, K] transposed, plus bias [N]: [M, N] in x's dtype, launched as `config` says.

    A matrix-vector launch (`block_m` 0) serves one row.
    """
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    product_launch(place_of(x.device), x, weight, bias, out, config).start()
    return out
