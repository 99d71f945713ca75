"""Rejection sampling, the usual scheme, for comparison: the distribution of plain decoding, not its tokens.

A drafted token x, drawn from q, is accepted with chance min(1, p(x) / q(x)); else the token comes from what p
has beyond q, max(p - q, 0) (Leviathan et al. 2023, algorithm 1; Chen et al. 2023). A drafter without
probabilities is sure of its guess: q is 1 there. p and q are after temperature, top-k, top-p and min-p.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backbench.backends.interface import SamplingBatch
from backbench.backends.noise import gumbel_noise
from backbench.backends.torch.operations import filter_logits

ACCEPT, REST = 0x51A7C01D, 0x2E57D4A1
"""Keep the coin tosses and the draws from the rest apart from the draws of drafts, which share their keys."""


def probabilities(logits: Tensor, sampling: SamplingBatch) -> Tensor:
    """What a row's token is drawn from, f32[S, V], of logits [S, V]; greedy rows have one token."""
    drawn = sampling.temperature > 0
    scaled = logits.float() / torch.where(drawn, sampling.temperature, 1.0)[:, None]
    if sampling.any_filter:
        scaled = filter_logits(scaled, sampling.top_k, sampling.top_p, sampling.min_p)
    greedy = torch.zeros_like(scaled).scatter_(1, logits.argmax(-1)[:, None], 1.0)
    return torch.where(drawn[:, None], scaled.softmax(-1), greedy)


def verify(target: Tensor, drafted: Tensor, proposed: Tensor | None, keys: Tensor) -> Tensor:
    """One token i64[N] a row: the drafted one where it is accepted, else another; never both alike.

    target: p, f32[N, V]; drafted: i64[N], -1 = nothing was drafted there, and the token is drawn from p;
    proposed: q, f32[N, V]; None = the drafter was sure. keys: i64[N], of the rows' draws.
    """
    has = drafted >= 0
    token = drafted.clamp_min(0)[:, None]
    if proposed is None:
        proposed = torch.zeros_like(target).scatter_(1, token, 1.0)
    uniform = torch.exp(-torch.exp(-gumbel_noise(keys ^ ACCEPT, 1)[:, 0]))
    accepted = has & (uniform * proposed.gather(1, token)[:, 0] < target.gather(1, token)[:, 0])
    rest = torch.where(has[:, None], (target - proposed).clamp_min(0), target)
    noise = gumbel_noise(torch.where(has, keys ^ REST, keys), target.shape[1])
    return torch.where(accepted, token[:, 0], (rest.log() + noise).argmax(-1))
