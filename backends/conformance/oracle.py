"""What the operations mean, in fp64, written without any backend's code."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from backbench.backends.interface import AttentionSpec, Weight
from backbench.backends.quantization import dequantize, meant_rows


def attention(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    """Causal attention of one sequence's last n positions: f64[n, q_heads, head_dim].

    q [n, q_heads, head_dim]; k, v [length, kv_heads, head_dim]. Query i sits at length - n + i and
    sees keys up to its own position, at most `spec.window` of them.
    """
    queries, length = q.shape[0], k.shape[0]
    grouped = q.double().unflatten(1, (spec.kv_heads, -1))
    scores = torch.einsum("qhgd,khd->hgqk", grouped, k.double()) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    position = torch.arange(length, device=q.device)
    distance = position[length - queries :, None] - position[None, :]
    visible = distance >= 0
    if spec.window is not None:
        visible &= distance < spec.window
    scores = scores.masked_fill(~visible, -math.inf)
    return torch.einsum("hgqk,khd->qhgd", torch.softmax(scores, dim=-1), v.double()).flatten(1, 2)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, f64."""
    wide = x.double()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.double()


def rotate_half(x: Tensor, positions: Tensor, cos_sin: Tensor, rotary_dim: int) -> Tensor:
    """The rotary embedding of x [T, heads, d] by pairs (i, i + rotary_dim / 2), f64 (Su et al. 2021)."""
    half = rotary_dim // 2
    table = cos_sin.double()[positions]
    cosine, sine = table[:, None, :half], table[:, None, half:rotary_dim]
    wide = x.double()
    first, second, rest = wide[..., :half], wide[..., half:rotary_dim], wide[..., rotary_dim:]
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine, rest), dim=-1)


def gate(gate_up: Tensor) -> Tensor:
    """silu(first half) * second half, f64."""
    first, second = gate_up.double().chunk(2, dim=-1)
    return first / (1 + torch.exp(-first)) * second


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [M, K] times weight [N, K] transposed, plus bias, f64[M, N]."""
    product = x.double() @ weight.double().T
    return product if bias is None else product + bias.double()


def quantized_linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """x [M, K] by a weight in any scheme, plus bias, f64[M, N]: `quantization.product` with exact sums."""
    return linear(meant_rows(x, weight), dequantize(weight, torch.float32), bias)


def allowed_tokens(scores: Tensor, top_k: int, top_p: float, min_p: float, slack: float) -> Tensor:
    """Which tokens of one row survive top-k, then top-p, then min-p: bool[V].

    scores: f64[V], already divided by the temperature. A positive `slack` widens every threshold and a
    negative one narrows it, so that rounding at a threshold can be told from a mistake. The most likely
    token always survives.
    """
    keep = torch.ones_like(scores, dtype=torch.bool)
    if 0 < top_k < scores.numel():
        keep &= scores >= scores.topk(top_k).values[-1] - slack
    if top_p < 1:
        keep &= _nucleus(scores.masked_fill(~keep, -math.inf), min(top_p * (1 + slack), 1), slack)
    if min_p > 0:
        keep &= scores >= scores.max() + math.log(min_p) - slack
    keep[scores.argmax()] = True
    return keep


def _nucleus(scores: Tensor, top_p: float, slack: float) -> Tensor:
    """The smallest set of most likely tokens whose probability reaches top_p, ties with the last included."""
    ordered, _ = scores.sort(descending=True)
    reached = torch.softmax(ordered, -1).cumsum(-1) >= top_p
    last = int(reached.nonzero()[0]) if bool(reached.any()) else scores.numel() - 1
    return scores >= ordered[last] - slack
