"""Elementwise operations and sampling in plain torch: the reference for each."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from backbench.backends.interface import AttentionSpec, Device, Operations, Rotation, SamplingBatch
from backbench.backends.noise import gumbel_noise

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class TorchOperations(Operations):
    """Every intermediate is fp32; results are rounded once to the input's dtype."""

    name = "torch"

    def refusals(self, dtype: torch.dtype, device: Device) -> list[str]:
        return [] if dtype in DTYPES else [f"dtype {dtype} is none of float32, bfloat16, float16"]

    def embed(self, ids: Tensor, table: Tensor) -> Tensor:
        return functional.embedding(ids, table)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return (wide * scale * weight.float()).to(x.dtype)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        residual = x + residual
        return self.rms_norm(residual, weight, eps), residual

    def rotate(
        self, qkv: Tensor, positions: Tensor, rotation: Rotation, spec: AttentionSpec
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads = qkv.view(qkv.shape[0], spec.q_heads + 2 * spec.kv_heads, spec.head_dim)
        q, k, v = heads.split([spec.q_heads, spec.kv_heads, spec.kv_heads], dim=1)
        if rotation.q_norm is not None:
            q = self.rms_norm(q, rotation.q_norm, rotation.eps)
        if rotation.k_norm is not None:
            k = self.rms_norm(k, rotation.k_norm, rotation.eps)
        cos, sin = rotation.rotary.cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
        return rotate_halves(q, cos, sin), rotate_halves(k, cos, sin), v

    def gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return (functional.silu(gate.float()) * up.float()).to(gate_up.dtype)

    def sample(self, logits: Tensor, sampling: SamplingBatch) -> Tensor:
        tokens = logits.argmax(-1)
        if sampling.all_greedy:
            return tokens
        drawn = sampling.temperature > 0
        rows = picked_rows(drawn)
        temperature = torch.where(drawn, sampling.temperature, 1.0)[rows]
        scaled = logits[rows].float() / temperature[:, None]
        if sampling.any_filter:
            top_k, top_p, min_p = sampling.top_k[rows], sampling.top_p[rows], sampling.min_p[rows]
            chosen = picked_rows((top_k > 0) | (top_p < 1) | (min_p > 0))
            scaled[chosen] = filter_logits(scaled[chosen], top_k[chosen], top_p[chosen], min_p[chosen])
        noise = gumbel_noise(sampling.noise_key[rows], logits.shape[-1])
        tokens[rows] = torch.where(drawn[rows], (scaled + noise).argmax(-1), tokens[rows])
        return tokens


def picked_rows(wanted: Tensor) -> Tensor | slice:
    """The rows where bool[S] `wanted` holds; all rows on a GPU, where picking would wait for the device."""
    return wanted.nonzero()[:, 0] if wanted.device.type == "cpu" else slice(None)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, d] rotated by angles [T, 1, r / 2]; dimensions past r pass through (Su et al. 2021)."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat([part.to(x.dtype) for part in rotated] + [rest], dim=-1)


def filter_logits(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Logits f32[S, V] with -inf where top-k, then top-p, then min-p exclude a token; ties stay.

    Each filter is a threshold on the logit, and looks at what the one before it left. Top-p keeps the
    smallest set whose probability reaches p (Holtzman et al. 2020); min-p keeps what is at least min_p
    times as likely as the most likely token (Nguyen et al. 2024).
    """
    vocab_size = logits.shape[-1]
    ordered = logits.sort(dim=-1, descending=True).values
    last = torch.where(top_k > 0, top_k.clamp(max=vocab_size), vocab_size).long() - 1
    threshold = ordered.gather(-1, last[:, None])
    ordered = ordered.masked_fill(ordered < threshold, -torch.inf)

    probability = ordered.softmax(-1)
    before = probability.cumsum(-1) - probability
    # The most likely token always stays, and top_p = 1 keeps all whatever the rounding of the sum.
    kept = (before < top_p[:, None]) | (top_p[:, None] >= 1)
    kept[:, 0] = True
    last_kept = ordered.masked_fill(~kept, torch.inf).amin(-1, keepdim=True)
    threshold = torch.maximum(threshold, last_kept)

    threshold = torch.maximum(threshold, ordered[:, :1] + min_p[:, None].log())
    return logits.masked_fill(logits < threshold, -torch.inf)
