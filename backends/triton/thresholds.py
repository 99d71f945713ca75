"""Thresholds of top-k, top-p and min-p on the device, exact, ties included, without a sort.

Each filter keeps the tokens whose scaled logit reaches a threshold. Floats are mapped to integers in the
same order; the threshold is the smallest integer t such that the tokens above t weigh less than a target:
their count less than k (top-k), their probability less than p of what top-k left (top-p).

Three launches. The first takes the largest logit of every group of neighbouring tokens. At least k groups
have a maximum that reaches the k-th largest maximum L, so the k-th largest token is at least L, and every
token that reaches L lies in one of those few groups. The second bisects over these candidates in
registers. Rows whose filters keep more than the candidates (flat distributions under top-p alone) are
left to the third, which bisects over the whole row.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from backbench.backends.interface import SamplingBatch
from backbench.backends.triton.launch import (
    BoundKernel,
    Launch,
    Place,
    parts,
    power_of_two,
    release_successor,
    wait_for_predecessor,
)

GROUPS = 128
"""Groups one program of the first launch reads."""
ROW_TILE = 8192
NOTHING_LOWER = tl.constexpr(-(2**31))


@triton.jit
def float_order(x):
    """An int32 that orders like the float x (no NaN)."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def float_of_order(order):
    """The inverse of `float_order`."""
    return tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True)


@triton.jit
def scaled(row, token, inside, heat):
    """Scaled logits of one row, -inf outside; adding zero turns -0 into 0."""
    value = tl.load(row + token, mask=inside, other=float("-inf")).to(tl.float32)
    return tl.div_rn(value, heat) + 0.0


@triton.jit
def halfway(low, high):
    """The middle of two int32 whose difference may not fit one."""
    return ((low.to(tl.int64) + high.to(tl.int64)) >> 1).to(tl.int32)


@triton.jit
def smallest_order(order, weight, low, high, target):
    """The smallest integer in [low, high] with less than `target` of `weight` above it (true at `high`)."""
    while low < high:
        middle = halfway(low, high)
        enough = tl.sum(tl.where(order > middle, weight, 0.0)) < target
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle + 1)
    return high


@triton.jit
def group_maxima_kernel(
    logits,
    temperature,
    maxima,
    chunk_top,
    chunk_mass,
    row_stride,
    vocab_size,
    group_count,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Scaled maxima f32[S, group_count]; per chunk its maximum and its sum of exp(scaled - maximum)."""
    release_successor(PDL)
    index = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    group = chunk * GROUPS + tl.arange(0, GROUPS)
    token = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    wait_for_predecessor(PDL)
    heat = tl.load(temperature + index)
    value = scaled(logits + index * row_stride, token, token < vocab_size, tl.where(heat > 0, heat, 1.0))
    largest = tl.max(value, axis=1)
    top = tl.max(largest, axis=0)
    base = tl.where(top == float("-inf"), 0.0, top)
    tl.store(maxima + index * group_count + group, largest, mask=group < group_count)
    tl.store(chunk_top + index * tl.num_programs(1) + chunk, top)
    tl.store(chunk_mass + index * tl.num_programs(1) + chunk, tl.sum(tl.exp(value - base)))


@triton.jit
def candidate_threshold_kernel(
    logits,
    temperature,
    top_k,
    top_p,
    min_p,
    maxima,
    chunk_top,
    chunk_mass,
    chosen_groups,
    threshold,
    row_stride,
    vocab_size,
    group_count,
    chunk_count,
    LIMIT: tl.constexpr,
    CANDIDATES: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program a row: the scaled logit a token must reach; NaN where the candidates do not suffice."""
    release_successor(PDL)
    index = tl.program_id(0).to(tl.int64)
    wait_for_predecessor(PDL)
    heat = tl.load(temperature + index)
    k = tl.load(top_k + index)
    p = tl.load(top_p + index)
    least = tl.load(min_p + index)
    result = float("-inf")
    counted = (k > 0) & (k < vocab_size)
    if (heat > 0) & (counted | (p < 1) | (least > 0)):
        group = tl.arange(0, BLOCK_GROUPS)
        inside = group < group_count
        largest = tl.load(maxima + index * group_count + group, mask=inside, other=float("-inf"))
        top = tl.max(largest, axis=0)
        if counted | (p < 1):
            order = float_order(largest)
            high = float_order(top)
            wanted = tl.where(counted, tl.minimum(k, LIMIT), LIMIT)
            ones = tl.where(inside, 1.0, 0.0)
            lowest = tl.min(tl.where(inside, order, high), axis=0)
            floor = smallest_order(order, ones, lowest, high, wanted.to(tl.float32))
            # Fewer groups than tokens wanted: every token is a candidate.
            floor = tl.where(group_count < wanted, NOTHING_LOWER, floor)

            chosen = inside & (order >= floor)
            place = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
            count = tl.sum(chosen.to(tl.int32), axis=0)
            listed = chosen_groups + index * CANDIDATES
            tl.store(listed + place, group, mask=chosen & (place < CANDIDATES))
            tl.debug_barrier()
            member = tl.arange(0, CANDIDATES)
            known = member < count
            found = tl.load(listed + member, mask=known, other=0)
            token = found[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
            live = known[:, None] & (token < vocab_size)
            value = scaled(logits + index * row_stride, token, live, heat)
            order = float_order(value)
            # A candidate under the floor may have equals outside the candidates: only those above count.
            mass = tl.where(live & (order >= floor), tl.exp(value - top), 0.0)

            complete = (count <= CANDIDATES) & ((k <= LIMIT) | (counted == 0))
            if counted:
                floor = smallest_order(order, tl.where(live, 1.0, 0.0), floor, high, k.to(tl.float32))
                mass = tl.where(order >= floor, mass, 0.0)
                whole = tl.sum(mass)
            else:
                chunk = tl.arange(0, BLOCK_CHUNKS)
                listed_chunk = chunk < chunk_count
                place_chunk = index * chunk_count + chunk
                tops = tl.load(chunk_top + place_chunk, mask=listed_chunk, other=float("-inf"))
                masses = tl.load(chunk_mass + place_chunk, mask=listed_chunk, other=0.0)
                whole = tl.sum(masses * tl.exp(tops - top))
                # The margin keeps rounding in the sums from deciding that the candidates suffice.
                complete = complete & (tl.sum(mass) > p * whole * 1.0001)
            if p < 1:
                floor = smallest_order(order, mass, floor, high, p * whole)
            result = tl.where(complete, float_of_order(floor), float("nan"))
        if least > 0:
            limit = top + tl.log(least)
            result = tl.where(result < limit, limit, result)
    tl.store(threshold + index, result)


@triton.jit
def weight_above(row, vocab_size, heat, order, floor, top, MASS: tl.constexpr, TILE: tl.constexpr):
    """Count (or, with MASS, sum of exp(x - top)) of a row's tokens above `order` and not under `floor`."""
    total = tl.zeros((TILE,), tl.float32)
    for start in range(0, vocab_size, TILE):
        token = start + tl.arange(0, TILE)
        inside = token < vocab_size
        value = scaled(row, token, inside, heat)
        place = float_order(value)
        if MASS:
            weight = tl.exp(value - top)
        else:
            weight = tl.full((TILE,), 1.0, tl.float32)
        total += tl.where(inside & (place > order) & (place >= floor), weight, 0.0)
    return tl.sum(total, axis=0)


@triton.jit
def bisect_row(row, vocab_size, heat, low, high, target, top, MASS: tl.constexpr, TILE: tl.constexpr):
    """`smallest_order` over a whole row in memory; tokens under `low` weigh nothing."""
    floor = low
    while low < high:
        middle = halfway(low, high)
        enough = weight_above(row, vocab_size, heat, middle, floor, top, MASS, TILE) < target
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle + 1)
    return high


@triton.jit
def row_threshold_kernel(
    logits,
    temperature,
    top_k,
    top_p,
    min_p,
    threshold,
    row_stride,
    vocab_size,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program a row whose threshold is still NaN: bisection over the whole row."""
    release_successor(PDL)
    index = tl.program_id(0).to(tl.int64)
    row = logits + index * row_stride
    wait_for_predecessor(PDL)
    found = tl.load(threshold + index)
    if found != found:
        heat = tl.load(temperature + index)
        k = tl.load(top_k + index)
        p = tl.load(top_p + index)
        least = tl.load(min_p + index)
        highest = tl.full((TILE,), float("-inf"), tl.float32)
        lowest = tl.full((TILE,), float("inf"), tl.float32)
        for start in range(0, vocab_size, TILE):
            token = start + tl.arange(0, TILE)
            inside = token < vocab_size
            value = scaled(row, token, inside, heat)
            highest = tl.maximum(highest, value)
            lowest = tl.minimum(lowest, tl.where(inside, value, float("inf")))
        top = tl.max(highest, axis=0)
        high = float_order(top)
        low = float_order(tl.min(lowest, axis=0))
        if (k > 0) & (k < vocab_size):
            low = bisect_row(row, vocab_size, heat, low, high, k.to(tl.float32), top, False, TILE)
        if p < 1:
            mass = weight_above(row, vocab_size, heat, low - 1, low, top, True, TILE)
            low = bisect_row(row, vocab_size, heat, low, high, p * mass, top, True, TILE)
        result = float_of_order(low)
        if least > 0:
            result = tl.maximum(result, top + tl.log(least))
        tl.store(threshold + index, result)


def candidate_sizes(arch: str) -> tuple[int, int, int]:
    """(tokens a group, largest top-k served from candidates, warps): what 512 threads hold in registers.

    Twice as many groups are examined as the largest k, which leaves room for ties.
    """
    if arch.startswith("gfx1"):
        return 64, 128, 16
    if arch.startswith("gfx9"):
        return 32, 256, 8
    return 32, 256 if arch in ("sm90", "cpu") else 128, 16


@cache
def _bound_thresholds(place: Place, vocab_size: int) -> tuple[BoundKernel, BoundKernel, BoundKernel]:
    """The group maxima, the candidates' threshold, the row's threshold."""
    group, limit, warps = candidate_sizes(place.arch)
    groups = parts(vocab_size, group)
    maxima = place.bind(group_maxima_kernel, GROUP=group, GROUPS=GROUPS, num_warps=8)
    candidates = place.bind(
        candidate_threshold_kernel,
        LIMIT=limit,
        CANDIDATES=2 * limit,
        GROUP=group,
        BLOCK_GROUPS=power_of_two(groups),
        BLOCK_CHUNKS=power_of_two(parts(groups, GROUPS)),
        num_warps=warps,
    )
    row = place.bind(row_threshold_kernel, TILE=min(ROW_TILE, power_of_two(vocab_size)), num_warps=16)
    return maxima, candidates, row


def threshold_launches(
    place: Place, logits: Tensor, sampling: SamplingBatch, threshold: Tensor
) -> list[Launch]:
    """What fills `threshold` f32[S] with the scaled logit each row's tokens must reach, in its order.

    logits [S, V] with unit column stride.
    """
    rows, vocab_size = logits.shape
    group, limit, _ = candidate_sizes(place.arch)
    groups = parts(vocab_size, group)
    chunks = parts(groups, GROUPS)
    device = logits.device
    maxima = torch.empty((rows, groups), dtype=torch.float32, device=device)
    chunk_top, chunk_mass = torch.empty((2, rows, chunks), dtype=torch.float32, device=device)
    chosen = torch.empty((rows, 2 * limit), dtype=torch.int32, device=device)
    bound_maxima, bound_candidates, bound_row = _bound_thresholds(place, vocab_size)
    heat, row_stride = sampling.temperature, logits.stride(0)
    filters = (logits, heat, sampling.top_k, sampling.top_p, sampling.min_p)
    found = (maxima, chunk_top, chunk_mass)
    return [
        Launch(bound_maxima, (rows, chunks, 1), (logits, heat, *found, row_stride, vocab_size, groups)),
        Launch(
            bound_candidates,
            (rows, 1, 1),
            (*filters, *found, chosen, threshold, row_stride, vocab_size, groups, chunks),
        ),
        Launch(bound_row, (rows, 1, 1), (*filters, threshold, row_stride, vocab_size)),
    ]
