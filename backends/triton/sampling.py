"""Drawing tokens on the device: the torch reference's draws, without a sort and without the host.

A row is cut into chunks; each chunk's program keeps its best score, a second kernel takes the best chunk.
The score is logit / temperature + Gumbel noise of (key, token), or the bare logit in a greedy row.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from backends.interface import SamplingBatch
from backends.triton.launch import compute_units, overlap, release_successor, wait_for_predecessor
from backends.triton.thresholds import filter_thresholds

GROUP = 8
"""Neighbouring tokens screened together."""
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
def fast_log(x):
    """The hardware's log (about 2^-22 absolute error), PTX only."""
    binary = tl.inline_asm_elementwise(
        "lg2.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )
    return binary * 0.6931471805599453


@triton.jit
def fast_noise(uniform):
    """Gumbel noise within 1e-3: near 1 the inner log is its own series, elsewhere the hardware's."""
    rest = 1.0 - uniform
    series = rest * (1.0 + rest * (0.5 + rest * (0.33333334 + rest * 0.25)))
    return -fast_log(tl.where(rest < 0.0625, series, -fast_log(uniform)))


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


@triton.jit
def may_win(value, bits, inverse, lowest, best, FILTER: tl.constexpr):
    """Whether any token of a tile [GROUPS, GROUP] can score `best` or more.

    A group's bound joins its largest logit with its largest noise, so that logarithms are taken once a
    group; the slack covers the hardware's approximations.
    """
    bound = tl.max(value, axis=1) * inverse
    slack = 0.002 + tl.abs(bound) * 1e-6
    uniform = (tl.max(bits, axis=1).to(tl.float32) + 0.5) * (1.0 / 8388608.0)
    score = bound + fast_noise(uniform) + slack
    if FILTER:
        score = tl.where(bound + slack >= lowest, score, float("-inf"))
    return tl.max(score, axis=0) >= best


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
    SCREEN: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    PDL: tl.constexpr,
):
    """Best score and its token among `tiles` tiles of GROUPS * GROUP tokens of one row.

    SCREEN: a tile is worked out exactly only where a cheap bound reaches the best so far; the result is
    the same. Greedy rows (temperature 0) score their bare logits.
    """
    release_successor(PDL)
    TILE: tl.constexpr = GROUPS * GROUP
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    lane = (tl.arange(0, GROUPS) * GROUP)[:, None] + tl.arange(0, GROUP)[None, :]
    wait_for_predecessor(PDL)
    heat = tl.load(temperature + row)
    key = tl.load(noise_key + row).to(tl.uint32)
    lowest = float("-inf")
    if FILTER:
        lowest = tl.load(threshold + row)
    divisor = tl.where(heat > 0, heat, 1.0)
    inverse = 1.0 / divisor
    best = float("-inf")
    best_at = LAST_TOKEN + 0
    for tile in range(tiles):
        token = (chunk * tiles + tile) * TILE + lane
        value = tl.load(logits + row * row_stride + token, mask=token < vocab_size, other=float("-inf"))
        value = value.to(tl.float32)
        bits = noise_bits(key, token.to(tl.uint32))
        worth = True
        if SCREEN:
            worth = may_win(value, bits, inverse, lowest, best, FILTER) | (heat <= 0)
        if worth:
            if heat > 0:
                noise = -tl.log(-tl.log((bits.to(tl.float32) + 0.5) * (1.0 / 8388608.0)))
                scaled = tl.div_rn(value, divisor)
                value = tl.where(scaled >= lowest, scaled + noise, float("-inf"))
            top = tl.max(value)
            if (top > best) | (best_at == LAST_TOKEN):
                best = top
                best_at = tl.min(tl.where(value == top, token, LAST_TOKEN))
    slot = row * tl.num_programs(1) + chunk
    tl.store(best_score + slot, best)
    tl.store(best_token + slot, best_at)


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


def sample(logits: Tensor, sampling: SamplingBatch) -> Tensor:
    """See `Operations.sample`; logits [S, V] in bf16, fp16 or fp32, rows may be strided."""
    rows, vocab_size = logits.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows == 0:
        return out
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    greedy = sampling.all_greedy
    tile, tiles, chunks = split_row(rows, vocab_size, compute_units(logits.device), greedy)
    score = torch.empty((rows, chunks), dtype=torch.float32, device=logits.device)
    token = torch.empty((rows, chunks), dtype=torch.int32, device=logits.device)
    launch = overlap(logits)
    if greedy:
        greedy_chunk_kernel[(rows, chunks)](
            logits, score, token, logits.stride(0), vocab_size, tiles, TILE=tile, num_warps=4, **launch
        )
    else:
        random_chunk_kernel[(rows, chunks)](
            logits,
            sampling.temperature,
            sampling.noise_key,
            filter_thresholds(logits, sampling) if sampling.any_filter else logits,
            score,
            token,
            logits.stride(0),
            vocab_size,
            tiles,
            FILTER=sampling.any_filter,
            SCREEN=tiles > 2 and screens(logits),
            GROUPS=tile // GROUP,
            GROUP=GROUP,
            num_warps=4,
            **launch,
        )
    best_of_row_kernel[(rows,)](
        score, token, out, chunks, vocab_size, BLOCK=triton.next_power_of_2(chunks), num_warps=1, **launch
    )
    return out


def split_row(rows: int, vocab_size: int, units: int, greedy: bool) -> tuple[int, int, int]:
    """(tokens a tile, tiles a chunk, chunks a row): enough programs for every unit, else long chunks.

    A long chunk screens better, since its best so far is soon hard to reach.
    """
    tile = 1024 if rows <= 4 else 2048
    tiles = triton.cdiv(vocab_size, tile)
    wanted = triton.cdiv((8 if greedy else 6) * units, rows)
    per_chunk = max(triton.cdiv(tiles, wanted), 1)
    return tile, per_chunk, triton.cdiv(tiles, per_chunk)


def screens(logits: Tensor) -> bool:
    """True where the approximate screen's instruction exists (NVIDIA)."""
    return logits.is_cuda and torch.version.hip is None
