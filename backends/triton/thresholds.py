"""Thresholds of top-k, top-p and min-p, found by bisection instead of a sort.

Each filter keeps the tokens whose scaled logit reaches a threshold. Floats are mapped to integers in the
same order; the threshold is the smallest integer t such that the tokens above t weigh less than a target:
their count less than k (top-k), their probability less than p of what top-k left (top-p). A few dozen
passes over a row that lies in the cache replace the sort, and the result is exact, ties included.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from backends.interface import SamplingBatch
from backends.triton.launch import overlap, release_successor, wait_for_predecessor

TILE = 4096


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
def scaled_tile(row, start, vocab_size, heat, TILE: tl.constexpr):
    """Scaled logits f32[TILE] of one row, -inf past its end; adding zero turns -0 into 0."""
    token = start + tl.arange(0, TILE)
    inside = token < vocab_size
    value = tl.load(row + token, mask=inside, other=float("-inf")).to(tl.float32)
    return tl.div_rn(value, heat) + 0.0, inside


@triton.jit
def weight_above(row, vocab_size, heat, order, floor, top, MASS: tl.constexpr, TILE: tl.constexpr):
    """Count (or, with MASS, sum of exp(x - top)) of tokens above `order` and not under `floor`."""
    total = tl.zeros((TILE,), tl.float32)
    for start in range(0, vocab_size, TILE):
        value, inside = scaled_tile(row, start, vocab_size, heat, TILE)
        place = float_order(value)
        if MASS:
            weight = tl.exp(value - top)
        else:
            weight = tl.full((TILE,), 1.0, tl.float32)
        total += tl.where(inside & (place > order) & (place >= floor), weight, 0.0)
    return tl.sum(total, axis=0)


@triton.jit
def bisect(row, vocab_size, heat, low, high, target, floor, top, MASS: tl.constexpr, TILE: tl.constexpr):
    """The smallest order in [low, high] with less than `target` above it (true at `high`)."""
    while low < high:
        middle = (low.to(tl.int64) + high.to(tl.int64)) >> 1
        middle = middle.to(tl.int32)
        above = weight_above(row, vocab_size, heat, middle, floor, top, MASS, TILE)
        enough = above < target
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle + 1)
    return high


@triton.jit
def threshold_kernel(
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
    """One program a row: the scaled logit a token must reach; -inf where nothing is filtered."""
    release_successor(PDL)
    index = tl.program_id(0).to(tl.int64)
    row = logits + index * row_stride
    wait_for_predecessor(PDL)
    heat = tl.load(temperature + index)
    k = tl.load(top_k + index)
    p = tl.load(top_p + index)
    least = tl.load(min_p + index)
    result = float("-inf")
    limits_count = (k > 0) & (k < vocab_size)
    if (heat > 0) & (limits_count | (p < 1) | (least > 0)):
        highest = tl.full((TILE,), float("-inf"), tl.float32)
        lowest = tl.full((TILE,), float("inf"), tl.float32)
        for start in range(0, vocab_size, TILE):
            value, inside = scaled_tile(row, start, vocab_size, heat, TILE)
            highest = tl.maximum(highest, value)
            lowest = tl.minimum(lowest, tl.where(inside, value, float("inf")))
        top = tl.max(highest, axis=0)
        high = float_order(top)
        low = float_order(tl.min(lowest, axis=0))
        if limits_count:
            low = bisect(row, vocab_size, heat, low, high, k.to(tl.float32), low, top, False, TILE)
        if p < 1:
            mass = weight_above(row, vocab_size, heat, low - 1, low, top, True, TILE)
            low = bisect(row, vocab_size, heat, low, high, p * mass, low, top, True, TILE)
        result = float_of_order(low)
        if least > 0:
            result = tl.maximum(result, top + tl.log(least))
    tl.store(threshold + index, result)


def filter_thresholds(logits: Tensor, sampling: SamplingBatch) -> Tensor:
    """f32[S]: the scaled logit each row's tokens must reach; logits [S, V] with unit column stride."""
    rows, vocab_size = logits.shape
    threshold = torch.empty(rows, dtype=torch.float32, device=logits.device)
    threshold_kernel[(rows,)](
        logits,
        sampling.temperature,
        sampling.top_k,
        sampling.top_p,
        sampling.min_p,
        threshold,
        logits.stride(0),
        vocab_size,
        TILE=min(TILE, triton.next_power_of_2(vocab_size)),
        num_warps=16,
        **overlap(logits),
    )
    return threshold
