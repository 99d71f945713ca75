"""The fused rotate-and-write against `Operations.rotate` followed by `write`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from backbench.backends.conformance import attention_run as runs
from backbench.backends.conformance import oracle
from backbench.backends.conformance.attention_cases import AttentionCase
from backbench.backends.conformance.finding import Finding
from backbench.backends.conformance.operation_check import rotary_table
from backbench.backends.conformance.scenario import make_batch
from backbench.backends.conformance.tolerance import deviation, limit
from backbench.backends.interface import AttentionRunner, Device, Operations, Rotary, Rotation
from backbench.backends.quantization import kept_heads

EPS = 1e-6


def check_fused_write(
    case: AttentionCase, runner: AttentionRunner, reference: Operations, device: Device
) -> Finding:
    """q, and K and V as they read back, for a padded batch, with head norms and without."""
    if not runner.fused_write:
        return Finding(refused="no fused write is offered; Operations.rotate and write serve")
    plain = _one(case, runner, reference, device, norms=False)
    return plain.merged(_one(case, runner, reference, device, norms=True))


def _one(
    case: AttentionCase, runner: AttentionRunner, reference: Operations, device: Device, *, norms: bool
) -> Finding:
    spec, target = case.spec, device.torch_device
    setup = runs.set_up(case)
    batch = make_batch(case.rows, setup.layout, target, pad_tokens=2)
    live = batch.num_tokens - 2
    generator = torch.Generator().manual_seed(runs.SEED)
    width = (spec.q_heads + 2 * spec.kv_heads) * spec.head_dim
    qkv = torch.randn(batch.num_tokens, width, generator=generator).to(spec.dtype)
    positions = torch.randint(0, 100, (batch.num_tokens,), generator=generator)
    rotary = Rotary(rotary_table(128, spec.head_dim).to(target), spec.head_dim)
    weights = [
        (1 + 0.1 * torch.randn(spec.head_dim, generator=generator)).to(spec.dtype) if norms else None
        for _ in range(2)
    ]
    q_norm, k_norm = (w if w is None else w.to(target) for w in weights)
    cache = runs.poisoned_cache(runner, setup.layout, spec, target)
    x, at, rotation = qkv.to(target), positions.to(target), Rotation(rotary, q_norm, k_norm, EPS)
    q = runner.rotate_and_write(x, at, rotation, cache, batch)
    stored_k, stored_v = _stored(runner, cache, batch.slots[:live])
    torch_q, torch_k, _ = reference.rotate(x, at, rotation, spec)
    torch_k = kept_heads(torch_k, spec.kv_dtype)
    heads = qkv.view(-1, spec.q_heads + 2 * spec.kv_heads, spec.head_dim)
    parts = heads.split([spec.q_heads, spec.kv_heads, spec.kv_heads], dim=1)

    def expected(x: Tensor, weight: Tensor | None) -> Tensor:
        normed = x.double() if weight is None else oracle.rms_norm(x, weight, EPS)
        table = rotary.cos_sin.cpu()
        return oracle.rotate_half(normed, positions, table, spec.head_dim)[:live]

    finding = Finding()
    for name, got, torch_got, given, weight, kept in (
        ("q", q, torch_q, parts[0], weights[0], spec.dtype),
        ("K", stored_k, torch_k, parts[1], weights[1], spec.kv_dtype),
    ):
        wanted = expected(given, weight)
        allowed = limit(deviation(torch_got[:live], wanted), wanted, kept)
        finding = finding.merged(Finding.measure(got[:live], wanted, allowed, name))
    exact = torch.equal(stored_v.cpu().float(), kept_heads(parts[2][:live], spec.kv_dtype).float())
    return finding.also([] if exact else ["V in the cache differs from the V that was given"])


def _stored(runner: AttentionRunner, cache: Any, slots: Tensor) -> tuple[Tensor, Tensor]:
    """K and V [T, kv_heads, head_dim] at `slots`."""
    block_size = runner.read(cache, slots[:1] * 0)[0].shape[1]
    k, v = runner.read(cache, slots // block_size)
    rows = torch.arange(slots.numel(), device=slots.device)
    return k[rows, slots % block_size], v[rows, slots % block_size]
