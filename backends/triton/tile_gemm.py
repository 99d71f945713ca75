"""x [M, K] times a quantized weight [N, K] transposed, for tens to thousands of rows of x of 16 bits.

The product is computed transposed, out^T = weight x^T: the weight is the operand that the matrix units take
from registers (wgmma and mma.sync alike), so codes become numbers in the registers they are multiplied from
and never lie in shared memory as numbers; rows of x go there by asynchronous copies or descriptors, and many
of them share each number made.

For this every step is one product, whose operand is codes loaded in that very step, put through operations
that leave each number with its thread: Triton (3.6) then moves the change of layout above them, to the codes
as they lie in shared memory.

No product runs on into the next step (`finished` says why). What hides the making of numbers is the product
of another program on the same multiprocessor: launches whose sums leave room for two get no more registers
than two have.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from backbench.backends.interface import Scheme
from backbench.backends.interface import weight as weights
from backbench.backends.triton.byte_gemm import exact
from backbench.backends.triton.codes import byte_numbers, exact_scale, times_scale, unpacked
from backbench.backends.triton.gemm import LINE, finished, prefetch_rows
from backbench.backends.triton.launch import (
    BoundKernel,
    Launch,
    Place,
    parts,
    release_successor,
    wait_for_predecessor,
)
from backbench.backends.triton.quantized_configs import Tile, step_of
from backbench.backends.triton.quantized_weight import BF16_SCALES, CODES, ENDLESS, QuantizedWeight

REGISTERS = 128
"""Of a thread, where sums take half of them or less: sixteen warps share a multiprocessor."""
BAND = 16
"""Blocks of rows of x that are multiplied by a block of the weight in turn."""


@triton.jit
def side_by_side(w0, w1, w2, w3, SPANS: tl.constexpr):
    """Four tiles [rows, words] of SPANS spans as one [rows, 4 words]; every number stays in its register."""
    ROWS: tl.constexpr = w0.shape[0]
    WORDS: tl.constexpr = w0.shape[1]
    both = tl.join(tl.join(w0, w1), tl.join(w2, w3))
    spans = tl.reshape(both, (ROWS, SPANS, WORDS // SPANS, 2, 2))
    return tl.reshape(tl.permute(spans, (0, 1, 4, 3, 2)), (ROWS, 4 * WORDS))


@triton.jit
def byte(word, KIND: tl.constexpr):
    """The code in the low half of each word (i16)."""
    low = word.to(tl.int8)
    return low if KIND == "int8" else low.to(tl.float8e4nv, bitcast=True)


@triton.jit
def zero_points(zero, at, k, depth, zero_step, ZERO_GROUP: tl.constexpr, KIND: tl.constexpr):
    """f32 zero points of all rows for the group of column k, or the last one."""
    if ZERO_GROUP > 0:
        group = tl.minimum(k, depth - 1) // ZERO_GROUP
        middle = tl.load(zero + at + group * zero_step).to(tl.float32)
    else:
        middle = tl.full(at.shape, 8.0 if KIND == "int4" else 0.0, tl.float32)
    return middle


@triton.jit
def beside(left, right):
    """Two tiles [rows, columns] as one [rows, 2 columns]."""
    both = tl.permute(tl.join(left, right), (0, 2, 1))
    return tl.reshape(both, (left.shape[0], 2 * left.shape[1]))


@triton.jit
def two(scale, at, group, last, scale_step):
    """Stored scales of two groups [rows, 2]; those past the last one are its own."""
    left = tl.load(scale + at + tl.minimum(group, last) * scale_step)
    right = tl.load(scale + at + tl.minimum(group + 1, last) * scale_step)
    return beside(left[:, None], right[:, None])


@triton.jit
def four(scale, at, group, last, scale_step):
    """Stored scales of four groups [rows, 4]."""
    return beside(two(scale, at, group, last, scale_step), two(scale, at, group + 2, last, scale_step))


@triton.jit
def step_scales(
    scale,
    at,
    k,
    depth,
    scale_step,
    STEP: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE_KIND: tl.constexpr,
    FINE: tl.constexpr,
):
    """Scales of the columns from k on, [rows, 1] where they share one, else [rows, STEP]; bf16 if FINE."""
    COUNT: tl.constexpr = STEP // GROUP if GROUP < STEP else 1
    tl.static_assert(COUNT <= 8, "a step of nine groups or more")
    last = (depth - 1) // GROUP
    group = k // GROUP
    if COUNT == 8:
        found = beside(four(scale, at, group, last, scale_step), four(scale, at, group + 4, last, scale_step))
    elif COUNT == 4:
        found = four(scale, at, group, last, scale_step)
    elif COUNT == 2:
        found = two(scale, at, group, last, scale_step)
    else:
        found = tl.load(scale + at + group * scale_step)[:, None]
    found = exact_scale(found, SCALE_KIND)
    if FINE:
        found = found.to(tl.bfloat16)
    if COUNT > 1:
        spread = tl.broadcast_to(found[:, :, None], (at.shape[0], COUNT, GROUP))
        found = tl.reshape(spread, (at.shape[0], STEP))
    return found


@triton.jit
def prefetch_scales(
    scale, k, depth, scale_step, STEP: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Fetch BLOCK_N rows' scales of the columns from k on, or the last, into L2; nothing waits for them."""
    groups = tl.arange(0, STEP // GROUP if GROUP < STEP else 1)
    group = tl.minimum(k // GROUP + groups, (depth - 1) // GROUP)
    prefetch_rows(scale + group * scale_step, BLOCK_N, BLOCK_N // LINE)


@triton.jit(do_not_specialize=["count", "steps", "part_steps"])
def tile_gemm_kernel(
    x,
    codes,
    scale,
    zero,
    row_scale,
    x_scale,
    bias,
    out,
    count,
    width,
    depth,
    steps,
    part_steps,
    x_stride,
    code_row,
    code_step,
    code_span,
    scale_row,
    scale_step,
    BIAS: tl.constexpr,
    ROW_SCALE: tl.constexpr,
    X_SCALE: tl.constexpr,
    ZERO_GROUP: tl.constexpr,
    KIND: tl.constexpr,
    SCALE_KIND: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_N: tl.constexpr,
    STEP: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr,
    EVEN_N: tl.constexpr,
    BOXES: tl.constexpr,
    CODE_BOXES: tl.constexpr,
    FINE: tl.constexpr,
    PARTIAL: tl.constexpr,
    BAND: tl.constexpr,
    STAGES: tl.constexpr,
    HALF: tl.constexpr,
    FETCH: tl.constexpr,
    PTX: tl.constexpr,
    WAIT: tl.constexpr,
    WIDEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_N of `width` outputs of BLOCK_M of `count` rows of x [count, depth], STEP columns at a time.

    Programs (tile, part): BAND blocks of rows of x are neighbours, so that the block of the weight they share
    stays in the cache. Part takes steps [part * part_steps, ...). PARTIAL: its fp32 sums go to out [part,
    count, width] without scales of whole rows and the bias, which `finish_kernel` adds.
    codes: 16-bit words, of step k and row n from k * code_step + n * code_row on: two codes of eight bits, or
    four of four (int4, fp4), of which a span of SPAN columns is a run, the next one code_span on.
    Scale and zero point of group g and row n are at g * scale_step + n // GROUP_N * scale_row. GROUP: columns
    that share a scale, ZERO_GROUP: a zero point, 0 = all and none, very many = all. Codes are scaled before
    they are multiplied, rounded once as a weight written out would be.
    x: a pointer, or with BOXES a descriptor of boxes [BLOCK_M, STEP], and so with CODE_BOXES codes, of boxes
    of BLOCK_N rows. EVEN: depth is a multiple of STEP, EVEN_N: width of BLOCK_N. FINE: rows are bf16, which
    holds every scale; HALF: fp16. FETCH: lines of scales are fetched STAGES steps ahead. WAIT: of `finished`.
    WIDEN: the interpreter multiplies bf16 wrongly, so operands are cast up there.
    """
    release_successor(PDL)
    tiles_m = tl.cdiv(count, BLOCK_M)
    tiles_n = tl.cdiv(width, BLOCK_N)
    tile = tl.program_id(0)
    band = tile // (BAND * tiles_n)
    high = tl.minimum(tiles_m - band * BAND, BAND)
    within = tile % (BAND * tiles_n)
    first_m = (band * BAND + within % high) * BLOCK_M
    m = first_m + tl.arange(0, BLOCK_M)
    first_n = within // high * BLOCK_N
    n = first_n + tl.arange(0, BLOCK_N)
    row = n if EVEN_N else tl.minimum(n, width - 1)
    part = tl.program_id(1)
    tl.static_assert(STEP == SPAN or ZERO_GROUP % STEP == 0, "a step has one zero point a slice")
    PACKED: tl.constexpr = KIND == "int4" or KIND == "fp4"
    CODES: tl.constexpr = 4 if PACKED else 2
    SLICE: tl.constexpr = SPAN // 4
    NUMBER: tl.constexpr = tl.float16 if HALF else tl.bfloat16
    lane = tl.arange(0, STEP)
    word = tl.arange(0, STEP // CODES)
    stored = word // SLICE * code_span + word % SLICE if PACKED else word
    first_k = word // SLICE * SPAN if PACKED else 2 * word
    rows = codes if CODE_BOXES else codes + row.to(tl.int64)[:, None] * code_row + stored[None, :]
    at = row // GROUP_N * scale_row
    present = (m < count)[:, None]
    source = x if BOXES else x + m.to(tl.int64)[:, None] * x_stride + lane[None, :]
    first = part * part_steps
    # Of four-bit weights every step reads other lines of scales, and only when it begins.
    if FETCH:
        for ahead in tl.static_range(STAGES):
            prefetch_scales(scale + first_n, (first + ahead) * STEP, depth, scale_step, STEP, GROUP, BLOCK_N)
    wait_for_predecessor(PDL)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    last = tl.minimum(steps, first + part_steps)
    for step in tl.range(first, last, num_stages=STAGES):
        k = step * STEP
        if FETCH:
            prefetch_scales(scale + first_n, k + STAGES * STEP, depth, scale_step, STEP, GROUP, BLOCK_N)
        if GROUP > 0:
            by = step_scales(scale, at, k, depth, scale_step, STEP, GROUP, SCALE_KIND, FINE)
        if CODE_BOXES:
            code = rows.load([step * width + first_n, 0] if PACKED else [first_n, step * (STEP // 2)])
        elif EVEN:
            code = tl.load(rows + tl.cast(step, tl.int64) * code_step)
        else:
            inside = (k + first_k < depth)[None, :]
            code = tl.load(rows + tl.cast(step, tl.int64) * code_step, mask=inside, other=0)
        if PACKED:
            z0 = zero_points(zero, at, k, depth, scale_step, ZERO_GROUP, KIND)
            z1, z2, z3 = z0, z0, z0
            if ZERO_GROUP % SPAN != 0:
                z1 = zero_points(zero, at, k + SLICE, depth, scale_step, ZERO_GROUP, KIND)
                z2 = zero_points(zero, at, k + 2 * SLICE, depth, scale_step, ZERO_GROUP, KIND)
                z3 = zero_points(zero, at, k + 3 * SLICE, depth, scale_step, ZERO_GROUP, KIND)
            w0, w1, w2, w3 = unpacked(code, z0, z1, z2, z3, tl.zeros((1,), NUMBER), KIND, PTX)
            w = side_by_side(w0, w1, w2, w3, STEP // SPAN)
        else:
            if PTX and not HALF and ZERO_GROUP == 0:
                w0, w1 = byte_numbers(code, KIND)
            else:
                middle = zero_points(zero, at, k, depth, scale_step, ZERO_GROUP, KIND)[:, None]
                w0 = (exact(byte(code, KIND)) - middle).to(NUMBER)
                w1 = (exact(byte(code >> 8, KIND)) - middle).to(NUMBER)
            w = tl.reshape(tl.join(w0, w1), (BLOCK_N, STEP))
        if BOXES:
            value = source.load([first_m, k])
        elif EVEN:
            value = tl.load(source + k, mask=present, other=0.0)
        else:
            value = tl.load(source + k, mask=present & (k + lane < depth)[None, :], other=0.0)
        if GROUP > 0:
            w = times_scale(w, by, FINE, PTX)
        if WIDEN:
            w = w.to(tl.float32)
            value = value.to(tl.float32)
        total = finished(tl.dot(w, tl.trans(value), total, input_precision="ieee"), WAIT)
    live = present & (n < width)[None, :]
    place = m.to(tl.int64)[:, None] * width + n[None, :]
    if PARTIAL:
        tl.store(out + part.to(tl.int64) * count * width + place, tl.trans(total), mask=live)
    else:
        if GROUP == 0:
            total *= exact_scale(tl.load(scale + at), SCALE_KIND)[:, None]
        if ROW_SCALE:
            total *= tl.load(row_scale + row)[:, None]
        if X_SCALE:
            total *= tl.load(x_scale + m, mask=m < count, other=0.0)[None, :]
        if BIAS:
            total += tl.load(bias + row).to(tl.float32)[:, None]
        # Rounded first: half as much is turned through shared memory.
        tl.store(out + place, tl.trans(total.to(out.dtype.element_ty)), mask=live)


def step_columns(config: Tile, weight: QuantizedWeight, arch: str) -> int:
    """Columns of a step."""
    return config.depth or (CODES * weight.words if weight.packed else step_of(weight.scheme, arch))


def without_empty_parts(config: Tile, weight: QuantizedWeight, arch: str) -> Tile:
    """`config` in as many parts as have a step to take: the kernel counts on one."""
    steps = parts(weight.k, step_columns(config, weight, arch))
    return replace(config, split=parts(steps, parts(steps, config.split)))


def tile_launch(
    place: Place,
    given: tuple[Tensor, ...],
    weight: QuantizedWeight,
    optional: tuple[bool, bool, bool],
    out: Tensor,
    config: Tile,
) -> Launch:
    """`out` [M, N], or [parts, M, N] where `config` splits (`without_empty_parts`), by one product kernel.

    given: rows [M, K], codes, scale, zero points, row scales, the rows' scales and bias [N], each read only
    where the weight has it; optional: whether there are a bias, row scales, scales of the rows of x.
    """
    x, stored, *rest = given
    count, depth = x.shape
    n, scheme = weight.n, weight.scheme
    step = span = step_columns(config, weight, place.arch)
    if weight.packed:
        span, stored = CODES * weight.words, stored.view(-1, weight.words)
        words, run = weight.words, n * weight.words
        codes, scales = (words, step // span * run, run), (1, n)
    else:
        words, stored = step // 2, stored.view(torch.int16)
        codes, scales = (depth // 2, words, 0), (weight.scale.shape[1], 1)
    fine = x.dtype == torch.bfloat16 and weight.scale.dtype in BF16_SCALES
    even = (depth % step == 0, n % config.tile_n == 0)
    traits = (weight.scale_kind, weight.scale_rows, *even, fine)
    boxes = (config.boxes and _has_boxes(x), config.code_boxes and step == span and _has_boxes(stored))
    bound = _bound(place, config, scheme, (step, span), optional, traits, boxes, x.dtype)
    source = _descriptor(x, [config.tile_m, step]) if boxes[0] else x
    code_source = _descriptor(stored, [config.tile_n, words]) if boxes[1] else stored
    steps = parts(depth, step)
    sizes = (count, n, depth, steps, parts(steps, config.split), x.stride(0))
    grid = (parts(count, config.tile_m) * parts(n, config.tile_n), config.split, 1)
    return Launch(bound, grid, (source, code_source, *rest, out, *sizes, *codes, *scales))


def _has_boxes(matrix: Tensor) -> bool:
    """Whether a descriptor takes it: rows that begin at multiples of 16 bytes."""
    return matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.element_size() % 16 == 0


def _descriptor(matrix: Tensor, box: list[int]) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), box)


@cache
def _bound(
    place: Place,
    config: Tile,
    scheme: Scheme,
    columns: tuple[int, int],
    optional: tuple[bool, bool, bool],
    traits: tuple[str, int, bool, bool, bool],
    boxes: tuple[bool, bool],
    dtype: torch.dtype,
) -> BoundKernel:
    bias, row_scale, x_scale = optional
    step, span = columns
    scale_kind, scale_rows, even, even_n, fine = traits
    group = scheme.group or 0
    # For matrix units of their own memory (sm100) the pipeliner takes no fetch in the loop.
    capped = place.arch == "sm90" and config.tile_m * config.tile_n <= 64 * 32 * config.warps
    fetches = place.speaks_ptx and int(place.arch[2:]) < 100
    return place.bind(
        tile_gemm_kernel,
        BIAS=bias,
        ROW_SCALE=row_scale,
        X_SCALE=x_scale,
        ZERO_GROUP=(group or ENDLESS) if scheme.zero_point else 0,
        KIND=scheme.weight,
        SCALE_KIND=scale_kind,
        GROUP=group,
        GROUP_N=scale_rows,
        STEP=step,
        SPAN=span,
        BLOCK_M=config.tile_m,
        BLOCK_N=config.tile_n,
        EVEN=even,
        EVEN_N=even_n,
        BOXES=boxes[0],
        CODE_BOXES=boxes[1],
        FINE=fine,
        PARTIAL=config.split > 1,
        BAND=BAND,
        STAGES=config.stages,
        HALF=dtype == torch.float16,
        FETCH=fetches and scheme.weight in weights.PACKED and group > 0,
        PTX=place.speaks_ptx,
        WAIT=place.arch == "sm90",
        WIDEN=place.interpreted,
        num_warps=config.warps,
        num_stages=config.stages,
        **({"maxnreg": REGISTERS} if capped else {}),
    )
