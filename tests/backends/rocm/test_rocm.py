"""The rocm backend on devices that are only names, with stand-ins of AITER's released signatures."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from released import with_signature
from torch import Tensor

from backbench.backends import registry
from backbench.backends.conformance import Status, oracle
from backbench.backends.conformance.attention_cases import make_case
from backbench.backends.conformance.attention_check import AttentionChecker
from backbench.backends.dependency import Release
from backbench.backends.interface import AttentionSpec, Device, RoundedRows, Scheme, Weight, device
from backbench.backends.quantization import SCHEMES, dequantize, quantize, rounded_rows
from backbench.backends.rocm import aiter, attention, linear
from backbench.backends.rocm.attention import AiterAttention, RocmAttention
from backbench.backends.rocm.cache import new_cache
from backbench.backends.rocm.fnuz import to_fnuz
from backbench.errors import BackendError

RELEASE: dict[str, Any] = json.loads((Path(__file__).parent / "aiter_signatures.json").read_text())[
    "amd-aiter"
]
SPEC = AttentionSpec(32, 8, 128, torch.bfloat16, torch.bfloat16, 16, 128**-0.5)


def machine(arch: str, vendor: str = "amd") -> Device:
    return replace(device.cpu(), vendor=vendor, arch=arch, name=f"fake {arch}", shared_bytes=65536)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    spec = AttentionSpec(q.shape[1], k.shape[1], q.shape[2], q.dtype, q.dtype, 16, q.shape[2] ** -0.5)
    return oracle.attention(q, k, v, spec).to(q.dtype)


def pa_fwd_asm(
    Q: Tensor, K: Tensor, V: Tensor, block_tables: Tensor, context_lens: Tensor,
    block_tables_stride0: int, max_qlen: int, out_: Tensor,
) -> None:  # fmt: skip
    """Reads keys and values element by element as the documented layouts place them."""
    assert block_tables_stride0 == block_tables.stride(0) and max_qlen == 1
    heads, parts, size, x = K.shape[1:]
    assert V.shape[1:] == (heads, size // x, parts * x, x)
    for row, length in enumerate(context_lens.tolist()):
        if not length:
            continue
        position = torch.arange(length)
        block, offset = block_tables[row, position // size].long(), position % size
        dim = torch.arange(parts * x)
        keys = K[block[:, None, None], torch.arange(heads)[:, None], dim // x, offset[:, None, None], dim % x]
        values = V[
            block[:, None, None], torch.arange(heads)[:, None], offset[:, None, None] // x, dim,
            offset[:, None, None] % x,
        ]  # fmt: skip
        out_[row : row + 1] = attend(Q[row : row + 1], keys, values)


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, softmax_scale: float, causal: bool, out: Tensor,
) -> None:  # fmt: skip
    assert causal and softmax_scale == q.shape[2] ** -0.5
    starts, ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for row in range(len(starts) - 1):
        tokens, keys = slice(starts[row], starts[row + 1]), slice(ends[row], ends[row + 1])
        out[tokens] = attend(q[tokens], k[keys], v[keys])


def gemm_a16w16(A: Tensor, B: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(A, B, bias)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """AITER's released version, as far as the backend can tell."""
    monkeypatch.setattr(Release, "version", lambda self: RELEASE["version"])
    bodies: dict[str, Callable[..., Any]] = {
        "pa_fwd_asm": pa_fwd_asm,
        "flash_attn_varlen_func": flash_attn_varlen_func,
        "gemm_a16w16": gemm_a16w16,
    }
    for path, names in RELEASE["functions"].items():
        module, name = path.split(":")
        monkeypatch.setitem(sys.modules, module, sys.modules.get(module) or types.ModuleType(module))
        setattr(sys.modules[module], name, with_signature(names, bodies[name]))


def test_every_call_is_in_the_released_signature() -> None:
    assert RELEASE["version"] == aiter.AITER.checked_version
    for path, keywords in {
        "aiter:pa_fwd_asm": attention.DECODE_KEYWORDS,
        "aiter:flash_attn_varlen_func": attention.PREFILL_KEYWORDS,
        "aiter.tuned_gemm:gemm_a16w16": linear.KEYWORDS,
    }.items():
        assert set(keywords) <= set(RELEASE["functions"][path])


@pytest.mark.parametrize("kind", ["values", "padding", "fork"])
@pytest.mark.parametrize("shape", ["decode", "mixed", "prefix"])
def test_aiter_agrees_with_the_oracle_through_the_stand_ins(kind: str, shape: str, installed: None) -> None:
    reference = registry.load("torch")
    assert reference.attention and reference.operations
    checker = AttentionChecker(AiterAttention(), reference.operations, reference.attention, machine("gfx942"))
    pad = 2 if kind == "padding" else 0
    row = checker.check(make_case(shape, torch.bfloat16, kind=kind, head_dim=128, pad=pad))
    assert row.status is Status.PASS, row.detail


def test_selection_by_architecture_and_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    rocm = RocmAttention()
    monkeypatch.setattr(Release, "version", lambda self: None)
    assert rocm.refusals(SPEC, machine("gfx942")) == []
    assert rocm.served_by(machine("gfx942")) == "rocm (triton)"
    monkeypatch.setattr(Release, "version", lambda self: "0.1.7")
    assert rocm.served_by(machine("gfx950")) == "rocm (rocm:aiter (amd-aiter 0.1.7; compiled, not run))"
    assert rocm.served_by(machine("gfx1100")) == "rocm (triton)"
    assert rocm.served_by(machine("gfx950"), replace(SPEC, window=100)) == "rocm (triton)"


def test_other_vendors_and_geometries_are_refused_with_every_reason() -> None:
    reasons = RocmAttention().refusals(SPEC, machine("sm90", "nvidia"))
    assert reasons == ["needs an AMD GPU, this is fake sm90; triton serves NVIDIA, torch anything"]
    odd = replace(SPEC, head_dim=64, block_size=32, window=100, scale=0.5)
    with pytest.raises(BackendError) as raised:
        AiterAttention().open(odd, machine("gfx1100"))
    text = str(raised.value)
    for reason in (
        "needs gfx942 or gfx950",
        "not installed",
        "not 64 in 32",
        "1 / sqrt",
        "no sliding window",
    ):
        assert reason in text
    assert "\n" not in text


def test_auto_prefers_rocm_on_amd_and_the_pins_exist() -> None:
    selection = registry.select("auto", device=machine("gfx942"), specs=[SPEC], dtype=torch.bfloat16)
    assert selection.attention.name == "rocm" and selection.linear.name == "rocm"
    assert selection.operations.name == "triton"
    pinned = registry.load("rocm:triton").attention
    assert pinned is not None and pinned.name == "triton"


def test_linear_uses_the_tuned_product(installed: None) -> None:
    served = registry.load("rocm").linear
    assert served is not None
    weight, x = torch.randn(24, 16).bfloat16(), torch.randn(3, 16).bfloat16()
    packed = served.pack(Weight(Scheme(), weight), machine("gfx942"))
    assert packed.product is not None
    assert torch.equal(served.run(x, packed), torch.nn.functional.linear(x, weight))


def test_a_quantized_product_takes_rounded_rows_as_the_triton_backends_does() -> None:
    served, x = linear.RocmLinear(), torch.randn(2, 256, dtype=torch.bfloat16)
    weight = quantize(torch.randn(64, 256, dtype=torch.bfloat16), SCHEMES["fp8"])
    packed = served.pack(weight, machine("gfx942"))
    assert served.rounding(packed) == "fp8-token"
    codes, scale = rounded_rows(x, "fp8-token")
    rows = RoundedRows(codes, scale.flatten(), x.dtype)
    assert torch.equal(served.run_rounded(rows, packed), served.run(x, packed))


def test_a_compressed_product_is_the_triton_backends(installed: None) -> None:
    """AITER's takes dense weights alone."""
    served = linear.RocmLinear()
    dense = torch.randn(64, 256, dtype=torch.bfloat16) * (torch.arange(256) % 4 < 2)
    spec = quantize(dense, Scheme(sparsity="2:4")).spec("down")
    packed = served.pack(quantize(dense, spec.scheme), machine("gfx942"))
    assert packed.product is None
    assert served.served_by(spec, machine("gfx942")).startswith("triton, vector kernel to 1 rows")
    unpacked = served.unpack(packed)
    assert unpacked is not None and torch.equal(dequantize(unpacked, dense.dtype), dense)


def test_the_preshuffled_layout_reads_back_and_skips_slot_minus_one() -> None:
    cache = new_cache(3, 2, 16, 32, torch.bfloat16, torch.device("cpu"))
    k, v = torch.randn(3, 2, 32).bfloat16(), torch.randn(3, 2, 32).bfloat16()
    cache.write(k, v, torch.tensor([5, -1, 40]))
    keys, values = cache.read(torch.arange(3))
    assert torch.equal(keys.flatten(0, 1)[[5, 40]], k[[0, 2]])
    assert torch.equal(values.flatten(0, 1)[[5, 40]], v[[0, 2]])
    assert int(keys.flatten(2).any(-1).sum()) == 2


def test_fnuz_keeps_every_value() -> None:
    bits = torch.arange(256, dtype=torch.uint8)
    weight = bits[(bits & 0x7F) != 0x7F].view(torch.float8_e4m3fn)
    converted, scale = to_fnuz(weight, torch.tensor(0.5))
    assert torch.equal(converted.float() * scale, weight.float() * 0.5)
    with pytest.raises(BackendError, match="NaN"):
        to_fnuz(bits.view(torch.float8_e4m3fn), torch.tensor(1.0))
    with pytest.raises(BackendError, match="float8_e4m3fn"):
        to_fnuz(torch.zeros(3), torch.tensor(1.0))
