"""The Triton operations against fp64 oracles and the torch backend; in the interpreter without a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backbench.backends.conformance import oracle
from backbench.backends.conformance.tolerance import complaint, deviation, limit
from backbench.backends.interface import AttentionSpec, Rotary, Rotation
from backbench.backends.torch.operations import TorchOperations
from backbench.backends.triton.cache import new_cache
from backbench.backends.triton.fused_write import rotate_and_write
from backbench.backends.triton.operations import TritonOperations

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-6
TORCH, TRITON = TorchOperations(), TritonOperations()


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def assert_close(actual: Tensor, reference: Tensor, exact: Tensor) -> None:
    """At most twice torch's error in the same dtype (plus one rounding) against fp64."""
    allowed = limit(deviation(reference, exact), exact, actual.dtype)
    assert not complaint(deviation(actual, exact), allowed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 96), (3, 1000), (2, 4096)])
def test_norm(dtype: torch.dtype, tokens: int, width: int) -> None:
    x, weight = random(tokens, width, dtype=dtype), random(width, dtype=dtype, seed=1)
    exact = oracle.rms_norm(x, weight, EPS)
    assert_close(TRITON.rms_norm(x, weight, EPS), TORCH.rms_norm(x, weight, EPS), exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_with_residual_keeps_the_sum(dtype: torch.dtype) -> None:
    x, residual = random(3, 320, dtype=dtype), random(3, 320, dtype=dtype, seed=1)
    weight = random(320, dtype=dtype, seed=2)
    total = x.double() + residual.double()
    expected, carried = TORCH.add_rms_norm(x, residual.clone(), weight, EPS)
    actual, kept = TRITON.add_rms_norm(x, residual.clone(), weight, EPS)
    assert_close(kept, carried, total)
    assert_close(actual, expected, oracle.rms_norm(total, weight, EPS))


@pytest.mark.parametrize("eps", [1e-3, 1.0])
def test_small_rows_are_held_down_by_eps(eps: float) -> None:
    """Rows whose mean square is far under eps: without it they would come out a thousand times larger."""
    x, weight = 1e-4 * random(3, 96), random(96, seed=1)
    torch.testing.assert_close(TRITON.rms_norm(x, weight, eps), TORCH.rms_norm(x, weight, eps))
    normed, _ = TRITON.add_rms_norm(x, x.clone(), weight, eps)
    torch.testing.assert_close(normed, TORCH.add_rms_norm(x, x.clone(), weight, eps)[0])
    spec, rotary, norm = rotary_case(64, 64, torch.float32)
    rotation, positions = Rotation(rotary, norm, norm, eps), torch.arange(3, device=DEVICE)
    qkv = 1e-4 * random(3, 8 * 64)
    for actual, expected in zip(
        TRITON.rotate(qkv, positions, rotation, spec),
        TORCH.rotate(qkv, positions, rotation, spec),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected)


def test_norm_of_strided_rows() -> None:
    wide = random(4, 96)
    x = wide[:, 32:]
    weight = random(64, seed=1)
    torch.testing.assert_close(TRITON.rms_norm(x, weight, EPS), TORCH.rms_norm(x, weight, EPS))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 48), (2, 1536)])
def test_gate(dtype: torch.dtype, tokens: int, width: int) -> None:
    stacked = random(tokens, 2 * width, dtype=dtype)
    assert_close(TRITON.gate(stacked), TORCH.gate(stacked), oracle.gate(stacked))


def test_embedding_rows_are_copied() -> None:
    table = random(50, 200, dtype=torch.bfloat16)
    ids = torch.tensor([3, 49, 0, 3], device=DEVICE)
    assert torch.equal(TRITON.embed(ids, table), table[ids])


@pytest.mark.parametrize("operation", ["embed", "norm", "gate", "rotate"])
def test_no_tokens_no_launch(operation: str) -> None:
    x = torch.empty(0, 64, device=DEVICE)
    if operation == "embed":
        out = TRITON.embed(torch.empty(0, dtype=torch.int64, device=DEVICE), random(5, 64))
    elif operation == "norm":
        out = TRITON.rms_norm(x, random(64), EPS)
    elif operation == "gate":
        out = TRITON.gate(x)
    else:
        spec, rotary, _ = rotary_case(16, 16, torch.float32)
        out = TRITON.rotate(torch.empty(0, 128, device=DEVICE), x[:, 0], Rotation(rotary), spec)[0]
    assert out.shape[0] == 0


def rotary_case(head_dim: int, rotary_dim: int, dtype: torch.dtype) -> tuple[AttentionSpec, Rotary, Tensor]:
    """A spec of 4 query and 2 KV heads, a table of 64 positions, and a head norm's weight."""
    spec = AttentionSpec(4, 2, head_dim, dtype, dtype, block_size=16, scale=1.0)
    angles = torch.outer(torch.arange(64.0), 100.0 ** -torch.linspace(0, 1, rotary_dim // 2))
    rotary = Rotary(torch.cat([angles.cos(), angles.sin()], -1).to(DEVICE), rotary_dim)
    return spec, rotary, random(head_dim, dtype=dtype, seed=3)


def exact_heads(qkv: Tensor, positions: Tensor, rotary: Rotary, norm: Tensor | None) -> Tensor:
    """Normed and rotated q and k heads, f64[T, 6, d]."""
    heads = qkv.view(qkv.shape[0], 8, -1)[:, :6].double()
    if norm is not None:
        heads = oracle.rms_norm(heads, norm, EPS)
    return oracle.rotate_half(heads, positions, rotary.cos_sin, rotary.rotary_dim)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("tokens", "head_dim", "rotary_dim"), [(1, 64, 64), (3, 80, 80), (10, 24, 16)])
def test_rotation(dtype: torch.dtype, normed: bool, tokens: int, head_dim: int, rotary_dim: int) -> None:
    spec, rotary, weight = rotary_case(head_dim, rotary_dim, dtype)
    norm = weight if normed else None
    qkv = random(tokens, 8 * head_dim, dtype=dtype)
    positions = torch.arange(tokens, device=DEVICE) * 7 % 64
    exact = exact_heads(qkv, positions, rotary, norm)
    rotation = Rotation(rotary, norm, norm, EPS)
    references = TORCH.rotate(qkv, positions, rotation, spec)
    actual = TRITON.rotate(qkv, positions, rotation, spec)
    for part, reference, expected in zip(actual, references, (exact[:, :4], exact[:, 4:]), strict=False):
        assert_close(part, reference, expected)
    assert torch.equal(actual[2], references[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "head_dim"), [(1, 64), (10, 80)])
def test_rotation_with_the_cache_write(dtype: torch.dtype, tokens: int, head_dim: int) -> None:
    spec, rotary, norm = rotary_case(head_dim, head_dim, dtype)
    qkv = random(tokens, 8 * head_dim, dtype=dtype)
    positions = torch.arange(tokens, device=DEVICE) * 5 % 64
    slots = torch.randperm(96, generator=torch.Generator().manual_seed(1))[:tokens].to(DEVICE)
    slots[tokens // 2] = -1
    if tokens > 1:
        slots[slots == 0] = 95
        slots[0] = 0  # the first slot of the first block is one like any other
    cache = new_cache(6, 2, 16, head_dim, dtype, DEVICE)
    for tensor in (cache.k, cache.v):
        tensor.fill_(torch.nan)
    rotation = Rotation(rotary, norm, norm, EPS)
    q = rotate_and_write(qkv, positions, rotation, cache, slots, spec)

    expected_q, expected_k, expected_v = TRITON.rotate(qkv, positions, rotation, spec)
    assert torch.equal(q, expected_q)
    live = slots >= 0
    for stored, expected in ((cache.k, expected_k), (cache.v, expected_v)):
        rows = stored.transpose(1, 2).reshape(96, 2, head_dim)
        assert torch.equal(rows[slots[live]], expected[live])
        untouched = torch.ones(96, dtype=torch.bool, device=DEVICE)
        untouched[slots[live]] = False
        assert bool(rows[untouched].isnan().all())
