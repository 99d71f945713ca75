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

TILE = 2048
LAST_TOKEN = tl.constexpr(0x7FFFFFFF)


@triton.jit
def gumbel_uniform(key, token):
    """The 23-bit uniform in (0, 1) of `backends.noise.gumbel_noise`, from uint32 key and token."""
    x = key ^ (token * 0x9E3779B9)
    x = x ^ (x >> 16)
    x = x * 0x85EBCA6B
    x = x ^ (x >> 13)
    x = x * 0xC2B2AE35
    x = x ^ (x >> 16)
    return ((x >> 9).to(tl.float32) + 0.5) * (1.0 / 8388608.0)


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
def best_of_chunk_kernel(
    logits,
    temperature,
    noise_key,
    threshold,
    best_score,
    best_token,
    row_stride,
    vocab_size,
    tiles,
    GREEDY: tl.constexpr,
    FILTER: tl.constexpr,
    SCREEN: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Best score and its token among `tiles` * TILE tokens of one row.

    SCREEN: a tile's scores are first bounded with the hardware's approximate log, and worked out exactly
    only where the bound reaches the best so far; the result is the same.
    """
    release_successor(PDL)
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    lane = tl.arange(0, TILE)
    wait_for_predecessor(PDL)
    heat = 0.0
    key = tl.zeros((), tl.uint32)
    lowest = float("-inf")
    if not GREEDY:
        heat = tl.load(temperature + row)
        key = tl.load(noise_key + row).to(tl.uint32)
        if FILTER:
            lowest = tl.load(threshold + row)
    divisor = tl.where(heat > 0, heat, 1.0)
    inverse = 1.0 / divisor
    best = float("-inf")
    best_at = LAST_TOKEN + 0
    for tile in range(tiles):
        token = (chunk * tiles + tile) * TILE + lane
        value = tl.load(
            logits + row * row_stride + token,
            mask=token < vocab_size,
            other=float("-inf"),
            eviction_policy="evict_first",
        ).to(tl.float32)
        worth = True
        if SCREEN:  # noqa: SIM102 (a constexpr branch stays apart from a device branch)
            if heat > 0:
                bound = value * inverse
                slack = 0.002 + tl.abs(bound) * 1e-6
                bound += fast_noise(gumbel_uniform(key, token.to(tl.uint32))) + slack
                worth = tl.max(bound, axis=0) >= best
        if worth:
            if not GREEDY:  # noqa: SIM102
                if heat > 0:
                    scaled = tl.div_rn(value, divisor)
                    noise = -tl.log(-tl.log(gumbel_uniform(key, token.to(tl.uint32))))
                    value = tl.where(scaled >= lowest, scaled + noise, float("-inf"))
            top = tl.max(value, axis=0)
            first = tl.min(tl.where(value == top, token, LAST_TOKEN), axis=0)
            if (top > best) | (best_at == LAST_TOKEN):
                best = top
                best_at = first
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
    filtered = not greedy and sampling.any_filter
    threshold = filter_thresholds(logits, sampling) if filtered else logits
    tiles, chunks = split_row(rows, vocab_size, compute_units(logits.device))
    score = torch.empty((rows, chunks), dtype=torch.float32, device=logits.device)
    token = torch.empty((rows, chunks), dtype=torch.int32, device=logits.device)
    launch = overlap(logits)
    best_of_chunk_kernel[(rows, chunks)](
        logits,
        sampling.temperature,
        sampling.noise_key,
        threshold,
        score,
        token,
        logits.stride(0),
        vocab_size,
        tiles,
        GREEDY=greedy,
        FILTER=filtered,
        SCREEN=not greedy and screens(logits),
        TILE=TILE,
        num_warps=4,
        **launch,
    )
    best_of_row_kernel[(rows,)](
        score, token, out, chunks, vocab_size, BLOCK=triton.next_power_of_2(chunks), num_warps=1, **launch
    )
    return out


def split_row(rows: int, vocab_size: int, units: int) -> tuple[int, int]:
    """(tiles a chunk, chunks a row): about eight programs a compute unit, tiles a power of two."""
    tiles = triton.cdiv(vocab_size, TILE)
    wanted = max(triton.cdiv(8 * units, rows), 1)
    per_chunk = max(triton.next_power_of_2(triton.cdiv(tiles, wanted)), 1)
    return per_chunk, triton.cdiv(tiles, per_chunk)


def screens(logits: Tensor) -> bool:
    """True where the approximate screen's instruction exists (NVIDIA)."""
    return logits.is_cuda and torch.version.hip is None
