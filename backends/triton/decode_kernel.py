"""Paged attention of one query token a sequence, or a few: split-KV, balanced on the device, in one launch.

The keys of all (sequence, kv head) pairs, cut into tiles, are one line of work that a fixed number of
programs share in equal parts, so the grid is the same for every batch (a CUDA or HIP graph can hold it)
and no program is left with a longer tail (Stream-K, Osama et al. 2023, for Flash-Decoding's split-KV).
A program's part may begin or end inside a pair; each such piece leaves its unnormalised sum in a
workspace, and the program that arrives last at a pair's counter merges the pieces in a fixed order.
Opening a pair takes time too: in a batch of unequal lengths each pair begins with a lead-in, counted as
work but empty, or the program that meets the most short sequences would finish long after the others.

A sequence that verifies drafts has a few query tokens. A tile of the matrix units has rows for them beside
those of the group's heads, so that its keys are read once, as for one token: DRAFTED.
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
    origin_of,
    scaled_scores,
    seen,
    widened,
)
from backbench.backends.triton.launch import release_successor, wait_for_predecessor
from backbench.backends.triton.paired_decode import paired_piece


@triton.jit
def decode_piece(
    q, k_cache, v_cache, k_scale, v_scale, table, head, length, position, first, last, scale, cap,
    block_stride,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr,
    WIDEN: tl.constexpr, PTX: tl.constexpr, SCALED: tl.constexpr, DRAFTED: tl.constexpr,
):  # fmt: skip
    """Attention of q [M, PADDED_DIM] over tiles first to last: unnormalised sum, maximum (base 2), total.

    position: DRAFTED, that of each row's token, i32[M].
    """
    M: tl.constexpr = q.shape[0]
    maximum = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    sums = tl.zeros([M, PADDED_DIM], tl.float32)
    unit = first_unit(q)
    column = tl.arange(0, PADDED_DIM)
    within = tl.arange(0, TILE)
    block = tl.load(table + (first * TILE + within) // BLOCK_SIZE, first * TILE + within < length, other=0)
    for tile in tl.range(first, last, num_stages=STAGES):
        key = tile * TILE + within
        live = key < length
        start = widened(block, WIDE) * block_stride + (head * BLOCK_SIZE + key % BLOCK_SIZE) * HEAD_DIM
        offsets = start[:, None] + column[None, :]
        mask = live[:, None]
        if PADDED_DIM != HEAD_DIM:
            mask = mask & (column < HEAD_DIM)[None, :]
        k = tl.load(k_cache + offsets, mask=mask, other=0.0)
        v = tl.load(v_cache + offsets, mask=mask, other=0.0)
        factor = scale
        if SCALED:
            k_step, v_step = load_scales(
                k_scale, v_scale, block, head, key, length, block_stride, HEAD_DIM, BLOCK_SIZE, WIDE
            )
            factor = scale * k_step[None, :]
        # The next tile's blocks are fetched one turn ahead: a key's address never waits for them.
        block = tl.load(table + (key + TILE) // BLOCK_SIZE, mask=key + TILE < length, other=0)
        raw = matmul(q, tl.trans(operand(k, q, WIDEN, PTX)), WIDEN)
        scores = scaled_scores(raw, factor, cap, CAPPED)
        scores = tl.where(seen(key, live, length, position, WINDOW, DRAFTED), scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
        origin = origin_of(new_maximum, DRAFTED)
        weights = tl.exp2(scores - origin[:, None])
        shrink = tl.exp2(maximum - origin)
        total = total * shrink + tl.sum(weights, axis=1)
        if SCALED:
            weights, shrink, unit = in_units(weights, v_step, shrink, unit, q)
        v = operand(v, q, WIDEN, PTX)
        sums = sums * shrink[:, None] + matmul(weights.to(q.dtype), v, WIDEN)
        maximum = new_maximum
    if SCALED:
        sums *= unit
    return sums, maximum, total


@triton.jit
def merge_pieces(
    sums_at, stats_at, first_slot, later_slot, count,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Merge `count` pieces: the first in slot `first_slot`, piece i > 0 in slot later_slot + 2 * i."""
    member = tl.arange(0, GROUP_PAD)
    column = tl.arange(0, PADDED_DIM)
    inside = (member < GROUP)[:, None] & (column < HEAD_DIM)[None, :]
    maximum = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    sums = tl.zeros([GROUP_PAD, PADDED_DIM], tl.float32)
    for begin in tl.range(0, count, CHUNK, num_stages=1):
        piece = begin + tl.arange(0, CHUNK)
        slot = tl.where(piece == 0, first_slot, later_slot + 2 * piece)
        stat = stats_at + (slot * (2 * GROUP))[:, None] + member[None, :]
        live = (piece < count)[:, None] & (member < GROUP)[None, :]
        maxima = tl.load(stat, mask=live, other=float("-inf"), cache_modifier=".cg")
        totals = tl.load(stat + GROUP, mask=live, other=0.0, cache_modifier=".cg")
        at = (slot * (GROUP * HEAD_DIM))[:, None, None] + (member[:, None] * HEAD_DIM + column[None, :])[None]
        part = tl.load(
            sums_at + at, (piece < count)[:, None, None] & inside[None], other=0.0, cache_modifier=".cg"
        )
        new_maximum = tl.maximum(maximum, tl.max(maxima, axis=0))
        # Padded members have no piece at all: keep their exponents finite.
        pivot = tl.where(member < GROUP, new_maximum, 0.0)
        weight = tl.exp2(maxima - pivot[None, :])
        shrink = tl.exp2(maximum - pivot)
        total = total * shrink + tl.sum(totals * weight, axis=0)
        sums = sums * shrink[:, None] + tl.sum(part * weight[:, :, None], axis=0)
        maximum = new_maximum
    return sums, total


@triton.jit
def merge_drafts(
    sums_at, stats_at, first_slot, later_slot, count, rows,
    M: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """`merge_pieces` of the first `rows` of M rows, one piece after the other.

    A thread has the same numbers of every piece, so nothing is exchanged between threads, as it would be
    for so many rows; CHUNK pieces are fetched at once.
    """
    member = tl.arange(0, M)
    column = tl.arange(0, PADDED_DIM)
    there = member < rows
    inside = there[:, None] & (column < HEAD_DIM)[None, :]
    sums_at += member[:, None] * HEAD_DIM + column[None, :]
    stats_at += member
    maximum = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    sums = tl.zeros([M, PADDED_DIM], tl.float32)
    for begin in tl.range(0, count, CHUNK, num_stages=1):
        for turn in tl.static_range(CHUNK):
            piece = begin + turn
            slot = tl.where(piece == 0, first_slot, later_slot + 2 * piece)
            live = there & (piece < count)
            stat = stats_at + slot * (2 * M)
            highest = tl.load(stat, mask=live, other=float("-inf"), cache_modifier=".cg")
            part_total = tl.load(stat + M, mask=live, other=0.0, cache_modifier=".cg")
            part = tl.load(
                sums_at + slot * (M * HEAD_DIM), inside & (piece < count), other=0.0, cache_modifier=".cg"
            )
            new_maximum = tl.maximum(maximum, highest)
            origin = origin_of(new_maximum, True)
            weight = tl.exp2(highest - origin)
            shrink = tl.exp2(maximum - origin)
            total = total * shrink + part_total * weight
            sums = sums * shrink[:, None] + part * weight[:, None]
            maximum = new_maximum
    return sums, total


@triton.jit
def fair_programs(work, pairs, available, equal, MIN_TILES: tl.constexpr):
    """How many programs share `work` tiles of `pairs` (sequence, kv head) pairs.

    As many as are `available` and leave each MIN_TILES. `equal` pairs are cut alike: a whole number of
    programs a pair, or of pairs a program, so that no program spans two pairs' ends.
    """
    pairs = tl.maximum(pairs, 1)
    wanted = tl.minimum(available, tl.maximum(work // MIN_TILES, 1))
    aligned = tl.where(pairs > wanted, tl.cdiv(pairs, tl.cdiv(pairs, wanted)), wanted // pairs * pairs)
    # None where every row is inert: a program without work would look for rows that do not exist.
    return tl.minimum(tl.where(equal, aligned, wanted), work)


@triton.jit
def part_begin(program, work, programs):
    """Where the part of `program` begins when `programs` share `work` equally."""
    return (tl.cast(program, tl.int64) * work // programs).to(tl.int32)


@triton.jit
def part_holding(item, work, programs):
    """The program whose part holds `item`."""
    return (((tl.cast(item, tl.int64) + 1) * programs - 1) // work).to(tl.int32)


@triton.jit
def heads_at(
    member, pair, first_token, tokens, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DRAFTED: tl.constexpr
):
    """Which of all [tokens, q_heads] heads are the rows `member` of a pair's tile, and which rows there are.

    DRAFTED, row r is the group's head r % GROUP of query token r // GROUP, of `tokens` from first_token on.
    """
    if DRAFTED:
        at = ((first_token + member // GROUP) * KV_HEADS + pair % KV_HEADS).to(tl.int64) * GROUP
        at += member % GROUP
        there = member < tokens * GROUP
    else:
        at = pair.to(tl.int64) * GROUP + member
        there = member < GROUP
    return at, there


@triton.jit
def hand_in_piece(
    sums, maximum, total, slot, pair, first_token, tokens, pair_begin, tiles_begin, pair_end, work, programs,
    piece_sums, piece_stats, counters, out,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, CHUNK: tl.constexpr, DRAFTED: tl.constexpr,
):  # fmt: skip
    """Leave a piece of `pair` in `slot`; the program whose piece is the last one merges them all.

    The pair's work runs from pair_begin (its lead-in) to pair_end, its tiles from tiles_begin.
    """
    M: tl.constexpr = sums.shape[0]
    MEMBERS: tl.constexpr = M if DRAFTED else GROUP
    rows = tokens * GROUP
    member = tl.arange(0, M)
    column = tl.arange(0, PADDED_DIM)
    there = member < (rows if DRAFTED else GROUP)
    inside = there[:, None] & (column < HEAD_DIM)[None, :]
    sums_at = slot * (MEMBERS * HEAD_DIM) + member[:, None] * HEAD_DIM + column[None, :]
    tl.store(piece_sums + sums_at, sums, mask=inside)
    stats_at = piece_stats + slot * (2 * MEMBERS) + member
    tl.store(stats_at, maximum, mask=there)
    tl.store(stats_at + MEMBERS, total, mask=there)
    opener = part_holding(tiles_begin, work, programs)
    count = part_holding(pair_end - 1, work, programs) - opener + 1
    tl.debug_barrier()
    arrived = tl.atomic_add(counters + pair, 1, sem="acq_rel")
    if arrived == count - 1:
        tl.store(counters + pair, 0)
        opened_inside = part_begin(opener, work, programs) < pair_begin
        first_slot = 2 * opener + opened_inside.to(tl.int32)
        if DRAFTED:
            row = member
            merged, weight = merge_drafts(
                piece_sums, piece_stats, first_slot, 2 * opener, count, rows, M, HEAD_DIM, PADDED_DIM, CHUNK
            )
        else:
            row = tl.arange(0, GROUP_PAD)
            merged, weight = merge_pieces(
                piece_sums, piece_stats, first_slot, 2 * opener, count,
                GROUP, GROUP_PAD, HEAD_DIM, PADDED_DIM, CHUNK,
            )  # fmt: skip
        at, live = heads_at(row, pair, first_token, tokens, KV_HEADS, GROUP, DRAFTED)
        out_at = at[:, None] * HEAD_DIM + column[None, :]
        kept = live[:, None] & (column < HEAD_DIM)[None, :]
        tl.store(out + out_at, (merged / weight[:, None]).to(out.dtype.element_ty), mask=kept)


@triton.jit
def find_sequence(seq_lens, ends, at, lead_in, TILE: tl.constexpr, REACH: tl.constexpr):
    """Where `at` lies: sequence, its begin, length, tiles its window skips, and what one pair of it spans."""
    seq, begin = find_row(ends, at)
    length = tl.load(seq_lens + seq, cache_modifier=".cg")
    skipped = 0
    if REACH > 0:
        skipped = tl.maximum(length - REACH, 0) // TILE
    return seq, begin, length, skipped, lead_in + tl.cdiv(length, TILE) - skipped


# A batch's size must not choose another binary: nothing compiles while serving.
@triton.jit(do_not_specialize=["num_seqs", "table_stride"])
def decode_kernel(
    q, k_cache, v_cache, k_scale, v_scale, block_table, seq_lens, out, piece_sums, piece_stats, counters,
    num_seqs, table_stride, block_stride, scale, cap, query_start,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, M: tl.constexpr,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr, MIN_TILES: tl.constexpr, LEAD_IN: tl.constexpr, CHUNK: tl.constexpr,
    STAGES: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr, WIDE: tl.constexpr,
    WIDEN: tl.constexpr, PAIRED: tl.constexpr, PTX: tl.constexpr, SCALED: tl.constexpr,
    DRAFTED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[s] = attention of q[s] [KV_HEADS * GROUP, HEAD_DIM] over sequence s, for s < num_seqs <= ROWS.

    q, out: [S, q_heads, HEAD_DIM] contiguous. piece_sums: f32[2 * programs, GROUP, HEAD_DIM];
    piece_stats: f32[2 * programs, 2, GROUP] (maximum, sum); counters: i32[S * KV_HEADS], zero before and
    after. Rows of length 0 are left alone. A program writes at most two pieces: where its part begins
    (slot 2 * program) and where it ends (slot 2 * program + 1).

    DRAFTED: sequence s has the query tokens query_start[s] to query_start[s + 1], at most M // GROUP, whose
    keys are its last; q and out have a row for each, pieces have M members in place of GROUP.

    SCALED: the cache is int8, with scales f32 [blocks, KV_HEADS, BLOCK_SIZE]. PAIRED: it is read as
    `paired_decode` does, bytes in pairs.

    With PDL, lengths and `query_start` are read before the predecessor has finished: they are a step's input,
    written before its first kernel.
    """
    release_successor(PDL)
    # The first of a few tokens sees further back than the last.
    REACH: tl.constexpr = WINDOW + (M // GROUP - 1 if DRAFTED and WINDOW > 0 else 0)
    row = tl.arange(0, ROWS)
    lengths = tl.load(seq_lens + row, mask=row < num_seqs, other=0, cache_modifier=".cg")
    tiles = tl.cdiv(lengths, TILE)
    if REACH > 0:
        tiles -= tl.maximum(lengths - REACH, 0) // TILE
    live = lengths > 0
    most = tl.max(tiles, axis=0)
    equal = most == tl.min(tl.where(live, tiles, most), axis=0)
    lead_in = tl.where(equal, 0, LEAD_IN)
    ends = tl.cumsum(tl.where(live, lead_in + tiles, 0), 0) * KV_HEADS
    work = tl.max(ends, axis=0)
    pairs = tl.sum(live.to(tl.int32), axis=0) * KV_HEADS
    programs = fair_programs(work, pairs, tl.num_programs(0), equal, MIN_TILES)
    if DRAFTED:
        first_tokens = tl.load(query_start + row, mask=row < num_seqs, other=0, cache_modifier=".cg")
        end_tokens = tl.load(query_start + row + 1, mask=row < num_seqs, other=0, cache_modifier=".cg")
    program = tl.program_id(0)
    # Every program waits, those without work too: a kernel that ends before its predecessor would let
    # its successor start before both.
    wait_for_predecessor(PDL)
    if program < programs:
        begin = part_begin(program, work, programs)
        end = part_begin(program + 1, work, programs)
        at = begin
        seq, seq_begin, length, skipped, span = find_sequence(seq_lens, ends, at, lead_in, TILE, REACH)
        while at < end:
            head = (at - seq_begin) // span
            pair_begin = seq_begin + head * span
            pair_end = pair_begin + span
            stop = tl.minimum(pair_end, end)
            tiles_begin = pair_begin + lead_in
            first = tl.maximum(at, tiles_begin)
            # A part may end inside a lead-in, where there is nothing to do.
            if first < stop:
                member = tl.arange(0, M)
                column = tl.arange(0, PADDED_DIM)
                pair = seq * KV_HEADS + head
                first_token, tokens, position = seq, 1, length
                if DRAFTED:
                    first_token = tl.sum(tl.where(row == seq, first_tokens, 0), axis=0)
                    tokens = tl.sum(tl.where(row == seq, end_tokens, 0), axis=0) - first_token
                    position = tl.minimum(length - tokens + member // GROUP, length - 1)
                at_heads, there = heads_at(member, pair, first_token, tokens, KV_HEADS, GROUP, DRAFTED)
                inside = there[:, None] & (column < HEAD_DIM)[None, :]
                q_at = at_heads[:, None] * HEAD_DIM + column[None, :]
                query = tl.load(q + q_at, mask=inside, other=0.0)
                table = block_table + seq.to(tl.int64) * table_stride
                if PAIRED:
                    sums, maximum, total = paired_piece(
                        query, k_cache, v_cache, k_scale, v_scale, table, head, length, position,
                        skipped + first - tiles_begin, skipped + stop - tiles_begin, scale, cap, block_stride,
                        HEAD_DIM, PADDED_DIM, BLOCK_SIZE, TILE, WINDOW, CAPPED, STAGES, WIDE, WIDEN, PTX,
                        SCALED, DRAFTED,
                    )  # fmt: skip
                else:
                    sums, maximum, total = decode_piece(
                        query, k_cache, v_cache, k_scale, v_scale, table, head, length, position,
                        skipped + first - tiles_begin, skipped + stop - tiles_begin, scale, cap, block_stride,
                        HEAD_DIM, PADDED_DIM, BLOCK_SIZE, TILE, WINDOW, CAPPED, STAGES, WIDE, WIDEN, PTX,
                        SCALED, DRAFTED,
                    )  # fmt: skip
                if stop - first == pair_end - tiles_begin:
                    tl.store(out + q_at, (sums / total[:, None]).to(out.dtype.element_ty), mask=inside)
                else:
                    hand_in_piece(
                        sums, maximum, total, 2 * program + (at != begin).to(tl.int32), pair, first_token,
                        tokens, pair_begin, tiles_begin, pair_end, work, programs, piece_sums, piece_stats,
                        counters, out, KV_HEADS, GROUP, GROUP_PAD, HEAD_DIM, PADDED_DIM, CHUNK, DRAFTED,
                    )  # fmt: skip
            at = stop
            if (stop == seq_begin + KV_HEADS * span) & (stop < end):
                seq, seq_begin, length, skipped, span = find_sequence(
                    seq_lens, ends, at, lead_in, TILE, REACH
                )
