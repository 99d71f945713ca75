"""Paged causal attention of many query tokens a sequence: prefill, chunks, and short verify steps.

FlashAttention-2 (Dao 2023) over a paged cache. The query heads that share a kv head are packed into the
rows of one tile (row r = query token r // GROUP, head r % GROUP), so that a tile spans few positions
and little of its diagonal is wasted. Key tiles that every row sees run without a mask; those at the
diagonal (and at a sliding window's edge) run with one. Keys come through the block table, or, where a
block holds a whole number of tiles, as boxes of a tensor descriptor (TMA on Hopper and newer).
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from backbench.backends.triton.kernel_math import (
    find_row,
    first_unit,
    in_units,
    load_scales,
    matmul,
    operand,
    scaled_scores,
    widened,
)
from backbench.backends.triton.launch import release_successor, wait_for_predecessor


@triton.jit
def load_tile(
    cache, block, first, head, length, block_stride,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr, DESCRIPTOR: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys or values first to first + TILE of one head: [TILE, PADDED_DIM]; zero past `length` if MASKED."""
    if DESCRIPTOR:
        return cache.load([(block * KV_HEADS + head) * BLOCK_SIZE + first % BLOCK_SIZE, 0])
    else:  # noqa: RET505 (the compiler follows both returns otherwise)
        key = first + tl.arange(0, TILE)
        column = tl.arange(0, PADDED_DIM)
        start = widened(block, WIDE) * block_stride + (head * BLOCK_SIZE + key % BLOCK_SIZE) * HEAD_DIM
        pointers = cache + start[:, None] + column[None, :]
        if MASKED:
            mask = (key < length)[:, None] & (column < HEAD_DIM)[None, :]
            return tl.load(pointers, mask=mask, other=0.0)
        elif PADDED_DIM != HEAD_DIM:  # noqa: RET505
            return tl.load(pointers, mask=(column < HEAD_DIM)[None, :], other=0.0)
        else:
            return tl.load(pointers)


@triton.jit
def load_blocks(table, first, length, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, DESCRIPTOR: tl.constexpr):
    """Physical blocks of keys first to first + TILE: one per key, or one scalar for a descriptor."""
    if DESCRIPTOR:
        return tl.load(table + first // BLOCK_SIZE, mask=first < length, other=0)
    else:  # noqa: RET505
        key = first + tl.arange(0, TILE)
        return tl.load(table + key // BLOCK_SIZE, mask=key < length, other=0)


@triton.jit
def attend_range(
    sums, maximum, total, unit, query, position, k_cache, v_cache, k_scale, v_scale, table, head,
    length, first, last, scale, cap, block_stride,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr, STAGES: tl.constexpr,
    DESCRIPTOR: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr, WIDEN: tl.constexpr,
    PTX: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Fold keys first to last (multiples of TILE) into the running sum, maximum (base 2) and total.

    `unit` is that of the sum, where the cache is SCALED.
    """
    block = load_blocks(table, first, length, BLOCK_SIZE, TILE, DESCRIPTOR)
    for begin in tl.range(first, last, TILE, num_stages=STAGES):
        begin = tl.multiple_of(begin, TILE)
        k = load_tile(
            k_cache, block, begin, head, length, block_stride,
            KV_HEADS, HEAD_DIM, PADDED_DIM, BLOCK_SIZE, TILE, DESCRIPTOR, WIDE, MASKED,
        )  # fmt: skip
        v = load_tile(
            v_cache, block, begin, head, length, block_stride,
            KV_HEADS, HEAD_DIM, PADDED_DIM, BLOCK_SIZE, TILE, DESCRIPTOR, WIDE, MASKED,
        )  # fmt: skip
        if SCALED:
            k_step, v_step = load_scales(
                k_scale, v_scale, block, head, begin + tl.arange(0, TILE), length, block_stride,
                HEAD_DIM, BLOCK_SIZE, WIDE,
            )  # fmt: skip
        block = load_blocks(table, begin + TILE, length, BLOCK_SIZE, TILE, DESCRIPTOR)
        raw = matmul(query, tl.trans(operand(k, query, WIDEN, PTX)), WIDEN)
        if SCALED:
            raw *= k_step[None, :]
        key = begin + tl.arange(0, TILE)
        v = operand(v, query, WIDEN, PTX)
        if CAPPED:
            raw = scaled_scores(raw, scale, cap, True)
        if MASKED:
            seen = key[None, :] <= position[:, None]
            if WINDOW > 0:
                seen = seen & (key[None, :] > position[:, None] - WINDOW)
            raw = tl.where(seen, raw, float("-inf"))
            if DESCRIPTOR:
                v = tl.where((key < length)[:, None], v, tl.zeros_like(v))
        if CAPPED:
            new_maximum = tl.maximum(maximum, tl.max(raw, axis=1))
        else:
            new_maximum = tl.maximum(maximum, tl.max(raw, axis=1) * scale)
        if MASKED:
            # A row that has seen nothing yet has weights exp2(-inf - finite) = 0, and no NaN.
            new_maximum = tl.maximum(new_maximum, -1.0e30)
        if CAPPED:
            weights = tl.exp2(raw - new_maximum[:, None])
        else:
            weights = tl.exp2(raw * scale - new_maximum[:, None])
        shrink = tl.exp2(maximum - new_maximum)
        total = total * shrink + tl.sum(weights, axis=1)
        if SCALED:
            weights, shrink, unit = in_units(weights, v_step, shrink, unit, query)
        sums = sums * shrink[:, None] + matmul(weights.to(query.dtype), v, WIDEN)
        maximum = new_maximum
    return sums, maximum, total, unit


# A batch's size must not choose another binary: nothing compiles while serving.
@triton.jit(do_not_specialize=["first_seq", "num_seqs", "table_stride"])
def prefill_kernel(
    q, k_cache, v_cache, k_scale, v_scale, block_table, query_start, seq_lens, out,
    first_seq, num_seqs, table_stride, block_stride, scale, cap,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, M: tl.constexpr, TILE: tl.constexpr,
    STAGES: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr, DESCRIPTOR: tl.constexpr,
    WIDE: tl.constexpr, WIDEN: tl.constexpr, PTX: tl.constexpr, SCALED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out = causal attention of q over sequences first_seq to num_seqs.

    q, out: [T, KV_HEADS * GROUP, HEAD_DIM] contiguous. Grid: (KV_HEADS, an upper bound of the number of
    query tiles); a program past the last tile ends at once. k_cache, v_cache: pointers, or with DESCRIPTOR
    descriptors of the flat caches with boxes [TILE, PADDED_DIM]. SCALED: the cache is int8, with scales f32
    [blocks, KV_HEADS, BLOCK_SIZE]. Later tiles come first: they see more keys, and long programs must not
    start last.
    """
    release_successor(PDL)
    wait_for_predecessor(PDL)
    TOKENS: tl.constexpr = M // GROUP
    head = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    row = tl.arange(0, ROWS)
    live = (row >= first_seq) & (row < num_seqs)
    starts = tl.load(query_start + row, mask=live, other=0)
    stops = tl.load(query_start + row + 1, mask=live, other=0)
    ends = tl.cumsum(tl.cdiv(stops - starts, TOKENS), 0)
    seq, seq_begin = find_row(ends, tile)
    if seq < num_seqs:
        start = tl.load(query_start + seq)
        count = tl.load(query_start + seq + 1) - start
        length = tl.load(seq_lens + seq)
        table = block_table + seq.to(tl.int64) * table_stride
        token = (tile - seq_begin) * TOKENS
        member = tl.arange(0, M)
        mine = token + member // GROUP
        inside = (member < TOKENS * GROUP) & (mine < count)
        first_position = length - count + token
        position = first_position + member // GROUP
        column = tl.arange(0, PADDED_DIM)
        at = ((start + mine).to(tl.int64) * (KV_HEADS * GROUP) + head * GROUP + member % GROUP) * HEAD_DIM
        at = at[:, None] + column[None, :]
        mask = inside[:, None] & (column < HEAD_DIM)[None, :]
        query = tl.load(q + at, mask=mask, other=0.0)

        # [low, middle): window's edge; [middle, full): every row sees every key; [full, high): diagonal.
        high = tl.minimum(first_position + TOKENS, length)
        full = (first_position + 1) // TILE * TILE
        low = 0
        middle = 0
        if WINDOW > 0:
            low = tl.maximum(first_position - WINDOW + 1, 0) // TILE * TILE
            middle = tl.cdiv(tl.maximum(high - WINDOW, 0), TILE) * TILE
            middle = tl.minimum(tl.maximum(middle, low), full)
        sums = tl.zeros([M, PADDED_DIM], tl.float32)
        maximum = tl.full([M], float("-inf"), tl.float32)
        total = tl.zeros([M], tl.float32)
        unit = first_unit(query)
        if WINDOW > 0:
            sums, maximum, total, unit = attend_range(
                sums, maximum, total, unit, query, position, k_cache, v_cache, k_scale, v_scale, table, head,
                length, low, middle, scale, cap, block_stride, KV_HEADS, HEAD_DIM, PADDED_DIM, BLOCK_SIZE,
                TILE, WINDOW, CAPPED, STAGES, DESCRIPTOR, WIDE, True, WIDEN, PTX, SCALED,
            )  # fmt: skip
        sums, maximum, total, unit = attend_range(
            sums, maximum, total, unit, query, position, k_cache, v_cache, k_scale, v_scale, table, head,
            length, middle, full, scale, cap, block_stride, KV_HEADS, HEAD_DIM, PADDED_DIM, BLOCK_SIZE,
            TILE, WINDOW, CAPPED, STAGES, DESCRIPTOR, WIDE, False, WIDEN, PTX, SCALED,
        )  # fmt: skip
        sums, maximum, total, unit = attend_range(
            sums, maximum, total, unit, query, position, k_cache, v_cache, k_scale, v_scale, table, head,
            length, full, high, scale, cap, block_stride, KV_HEADS, HEAD_DIM, PADDED_DIM, BLOCK_SIZE,
            TILE, WINDOW, CAPPED, STAGES, DESCRIPTOR, WIDE, True, WIDEN, PTX, SCALED,
        )  # fmt: skip
        if SCALED:
            sums *= unit
        # The start is read again: what is computed from it then takes no registers during the loops.
        query_row = tl.load(query_start + seq, volatile=True) + token + member // GROUP
        inside = (member < TOKENS * GROUP) & (query_row < start + count)
        at = (query_row.to(tl.int64) * (KV_HEADS * GROUP) + head * GROUP + member % GROUP) * HEAD_DIM
        mask = inside[:, None] & (column < HEAD_DIM)[None, :]
        result = (sums / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + at[:, None] + column[None, :], result, mask=mask)
