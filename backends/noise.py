"""Counter-based Gumbel noise for sampling: the same draw on every backend, host and batch.

A row's 32-bit key is hashed from (seed, draw index) on the host; a token's noise is hashed from
(key, token id) on the device. Nothing depends on the order or the company in which rows are sampled.
The mixer is MurmurHash3's 32-bit finaliser (Appleby 2011, public domain).
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
TOKEN_STRIDE = 0x9E3779B9
"""2^32 over the golden ratio: spreads neighbouring token ids before mixing."""


def mix(x: int) -> int:
    """MurmurHash3's 32-bit finaliser of x (0 <= x < 2^32)."""
    x ^= x >> 16
    x = (x * 0x85EBCA6B) & MASK
    x ^= x >> 13
    x = (x * 0xC2B2AE35) & MASK
    return x ^ (x >> 16)


def noise_key(seed: int, draw: int) -> int:
    """The 32-bit key of a request's `draw`-th sampled token; `seed` may be any integer (64 bits count)."""
    return mix((seed & MASK) ^ mix((seed >> 32 & MASK) ^ mix(draw & MASK)))


def gumbel_noise(noise_key: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise f32[S, vocab_size] for keys i64[S]: -log(-log(u)), u of 23 bits in (0, 1)."""
    token = torch.arange(vocab_size, device=noise_key.device, dtype=torch.int64)
    x = noise_key[:, None] ^ (token * TOKEN_STRIDE & MASK)[None, :]
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & MASK
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & MASK
    x = x ^ (x >> 16)
    uniform = ((x >> 9).to(torch.float32) + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))
