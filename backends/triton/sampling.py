"""Drawing tokens on the device: the torch reference's draws, without a sort and without the host.

A row is cut into chunks; each chunk's program keeps its best score, a second kernel takes the best chunk.
The score is logit / temperature + Gumbel noise of (key, token), or the bare logit in a greedy row.
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
    place_of,
    power_of_two,
    release_successor,
    wait_for_predecessor,
)
from backbench.backends.triton.thresholds import threshold_launches

CHUNK_TILE = 1024
"""Tokens a program looks at together."""
NEAR = tl.constexpr(2e-5)
"""Bound of the approximate score's error, relative to 1 + its size."""
LAST_TOKEN = tl.constexpr(0x7FFFFFFF)


@triton.jit
def noise_bits(key, token):
    """The 23 random bits (int32) of `backends.noise.gumbel_noise`, from uint32 key and token."""
    x = key ^ (token * 0x9E3779B9)
    x = x ^ (x >> 16)
    x = x * 0x85EBCA6B
    x = x ^ (x >> 13)
    x = x * 0xC2B2AE35
    x = x ^ (x >> 16)
    return (x >> 9).to(tl.int32)


@triton.jit
def uniform(bits):
    """The uniform in (0, 1) that 23 random bits stand for."""
    return (bits.to(tl.float32) + 0.5) * (1.0 / 8388608.0)


@triton.jit
def fast_log(x, PTX: tl.constexpr):
    """The logarithm within 3e-7 absolute: the hardware's on NVIDIA."""
    if PTX:
        binary = tl.inline_asm_elementwise(
            "lg2.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        binary = tl.log2(x)
    return binary * 0.6931471805599453


@triton.jit
def fast_noise(u, PTX: tl.constexpr):
    """Gumbel noise of u within `NEAR`: next to 1 the inner log is its own series."""
    rest = 1.0 - u
    series = rest * (1.0 + rest * (0.5 + rest * (0.33333334 + rest * 0.25)))
    return -fast_log(tl.where(rest < 0.03125, series, -fast_log(u, PTX)), PTX)


@triton.jit(do_not_specialize=["tiles"])
def greedy_chunk_kernel(
    logits,
    best_score,
    best_token,
    row_stride,
    vocab_size,
    tiles,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Largest logit and its first token among `tiles` * TILE tokens of one row."""
    release_successor(PDL)
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    lane = tl.arange(0, TILE)
    wait_for_predecessor(PDL)
    best = tl.full((TILE,), float("-inf"), tl.float32)
    best_at = chunk * tiles * TILE + lane
    for tile in range(tiles):
        token = (chunk * tiles + tile) * TILE + lane
        value = tl.load(logits + row * row_stride + token, mask=token < vocab_size, other=float("-inf"))
        value = value.to(tl.float32)
        best_at = tl.where(value > best, token, best_at)
        best = tl.maximum(value, best)
    top = tl.max(best, axis=0)
    slot = row * tl.num_programs(1) + chunk
    tl.store(best_score + slot, top)
    tl.store(best_token + slot, tl.min(tl.where(best == top, best_at, LAST_TOKEN), axis=0))


@triton.jit(do_not_specialize=["tiles"])
def random_chunk_kernel(
    logits,
    temperature,
    noise_key,
    threshold,
    best_score,
    best_token,
    row_stride,
    vocab_size,
    tiles,
    FILTER: tl.constexpr,
    PTX: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Best score and its token among `tiles` * TILE tokens of one row.

    Every lane keeps its best token by approximate logarithms, which the memory's pace allows. Then the
    lanes within `NEAR` of the chunk's best are scored exactly, and the best of them is the reference's
    (two such tokens in one lane would have to lie 1e-5 apart). Greedy rows score their bare logits, and
    their threshold is -inf.
    """
    release_successor(PDL)
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    lane = tl.arange(0, TILE)
    source = logits + row * row_stride
    wait_for_predecessor(PDL)
    heat = tl.load(temperature + row)
    key = tl.load(noise_key + row).to(tl.uint32)
    lowest = float("-inf")
    if FILTER:
        lowest = tl.load(threshold + row)
    divisor = tl.where(heat > 0, heat, 1.0)
    inverse = 1.0 / divisor
    noisy = tl.where(heat > 0, 1.0, 0.0)
    best = tl.full((TILE,), float("-inf"), tl.float32)
    best_at = chunk * tiles * TILE + lane
    for tile in range(tiles):
        token = (chunk * tiles + tile) * TILE + lane
        value = tl.load(source + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
        noise = fast_noise(uniform(noise_bits(key, token.to(tl.uint32))), PTX)
        score = value * inverse + noise * noisy
        if FILTER:
            score = tl.where(tl.div_rn(value, divisor) >= lowest, score, float("-inf"))
        best_at = tl.where(score > best, token, best_at)
        best = tl.maximum(score, best)

    top = tl.max(best, axis=0)
    near = (best >= top - NEAR * (1.0 + tl.abs(top))) & (best_at < vocab_size)
    value = tl.load(source + best_at, mask=near, other=float("-inf")).to(tl.float32)
    if heat > 0:
        noise = -tl.log(-tl.log(uniform(noise_bits(key, best_at.to(tl.uint32)))))
        value = tl.where(best > float("-inf"), tl.div_rn(value, divisor) + noise, float("-inf"))
    top = tl.max(value, axis=0)
    slot = row * tl.num_programs(1) + chunk
    tl.store(best_score + slot, top)
    tl.store(best_token + slot, tl.min(tl.where(value == top, best_at, LAST_TOKEN), axis=0))


@triton.jit
def best_of_row_kernel(
    best_score, best_token, out, chunks, vocab_size, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """The first of a row's best chunks: its token as i64."""
    release_successor(PDL)
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, BLOCK)
    inside = chunk < chunks
    wait_for_predecessor(PDL)
    score = tl.load(best_score + row * chunks + chunk, mask=inside, other=float("-inf"))
    token = tl.load(best_token + row * chunks + chunk, mask=inside, other=LAST_TOKEN)
    top = tl.max(score, axis=0)
    winner = tl.min(tl.where(score == top, token, LAST_TOKEN), axis=0)
    # A row of NaN has no maximum; a token inside the vocabulary keeps later gathers in bounds.
    tl.store(out + row, tl.minimum(winner, vocab_size - 1).to(tl.int64))


@cache
def _bound_greedy(place: Place) -> BoundKernel:
    return place.bind(greedy_chunk_kernel, TILE=CHUNK_TILE, num_warps=4)


@cache
def _bound_random(place: Place, filtered: bool) -> BoundKernel:
    return place.bind(
        random_chunk_kernel, FILTER=filtered, PTX=place.speaks_ptx, TILE=CHUNK_TILE, num_warps=4
    )


@cache
def _bound_best(place: Place, block: int) -> BoundKernel:
    return place.bind(best_of_row_kernel, BLOCK=block, num_warps=1)


def sample_launches(place: Place, logits: Tensor, sampling: SamplingBatch, out: Tensor) -> list[Launch]:
    """What draws `out` i64[S] from logits [S, V] with unit column stride, in its order; S > 0."""
    rows, vocab_size = logits.shape
    tiles, chunks = split_row(rows, vocab_size, place.units, CHUNK_TILE)
    score = torch.empty((rows, chunks), dtype=torch.float32, device=logits.device)
    token = torch.empty((rows, chunks), dtype=torch.int32, device=logits.device)
    sizes = (logits.stride(0), vocab_size, tiles)
    grid = (rows, chunks, 1)
    best = Launch(
        _bound_best(place, power_of_two(chunks)), (rows, 1, 1), (score, token, out, chunks, vocab_size)
    )
    if sampling.all_greedy:
        return [Launch(_bound_greedy(place), grid, (logits, score, token, *sizes)), best]
    filters: list[Launch] = []
    threshold = logits
    if sampling.any_filter:
        threshold = torch.empty(rows, dtype=torch.float32, device=logits.device)
        filters = threshold_launches(place, logits, sampling, threshold)
    arguments = (logits, sampling.temperature, sampling.noise_key, threshold, score, token, *sizes)
    return [*filters, Launch(_bound_random(place, sampling.any_filter), grid, arguments), best]


def sample(logits: Tensor, sampling: SamplingBatch) -> Tensor:
    """See `Operations.sample`; logits [S, V] in bf16, fp16 or fp32, rows may be strided."""
    out = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    if logits.shape[0]:
        logits = logits if logits.stride(1) == 1 else logits.contiguous()
        for launch in sample_launches(place_of(logits.device), logits, sampling, out):
            launch.start()
    return out


def split_row(rows: int, vocab_size: int, units: int, tile: int) -> tuple[int, int]:
    """(tiles a chunk, chunks a row): about twelve programs a compute unit, or one tile each."""
    tiles = parts(vocab_size, tile)
    per_chunk = max(tiles * rows // (12 * units), 1)
    return per_chunk, parts(tiles, per_chunk)
