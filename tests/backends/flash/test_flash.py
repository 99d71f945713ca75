"""The flash backend, with stand-ins that have the released signatures and compute what they document."""

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
from backbench.backends.conformance import Status, check_backend, oracle
from backbench.backends.dependency import Release
from backbench.backends.flash import fa2, fa3, fa4
from backbench.backends.flash.attention import LIBRARIES
from backbench.backends.flash.library import Library
from backbench.backends.interface import AttentionSpec, Device, device
from backbench.errors import BackendError

RELEASES: dict[str, Any] = json.loads((Path(__file__).parent / "signatures.json").read_text())
SPEC = AttentionSpec(8, 2, 64, torch.bfloat16, torch.bfloat16, 16, 0.125)
ABSENT = "not installed"


def machine(vendor: str, arch: str) -> Device:
    """A GPU that is only a name; tensors stay on the CPU."""
    return replace(device.cpu(), vendor=vendor, arch=arch, name=f"fake {arch}")


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, softcap: float | None) -> Tensor:
    """One sequence by the oracle; `window` is the library's left window."""
    spec = AttentionSpec(q.shape[1], k.shape[1], q.shape[2], q.dtype, q.dtype, 16, scale)
    spec = replace(spec, window=window + 1 if window >= 0 else None, softcap=softcap or None)
    return oracle.attention(q, k, v, spec).to(q.dtype)


def paged(k: Tensor, table: Tensor, length: int) -> Tensor:
    """A sequence's keys [length, kv_heads, d] out of pages [num_blocks, block_size, kv_heads, d]."""
    blocks = table[: -(-length // k.shape[1])].long()
    return k[blocks].flatten(0, 1)[:length]


def fa4_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    seqused_k: Tensor,
    max_seqlen_q: int,
    page_table: Tensor,
    softmax_scale: float,
    causal: bool,
    softcap: float | None,
    window_size_left: int | None,
    window_size_right: int | None,
    num_splits: int,
    out: Tensor,
) -> None:
    assert causal and page_table.dtype == seqused_k.dtype == torch.int32 and q.is_contiguous()
    assert (window_size_left is None) == (window_size_right is None) and num_splits == 1
    window = -1 if window_size_left is None else window_size_left
    if cu_seqlens_q is None:
        starts, q, out = list(range(len(q) + 1)), q[:, 0], out[:, 0]
    else:
        starts = cu_seqlens_q.tolist()
    for row, length in enumerate(seqused_k.tolist()):
        tokens = slice(starts[row], starts[row + 1])
        if length and tokens.stop > tokens.start:
            assert tokens.stop - tokens.start <= max_seqlen_q
            keys, values = (paged(x, page_table[row], length) for x in (k, v))
            out[tokens] = attend(q[tokens], keys, values, softmax_scale, window, softcap)


def varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    block_table: Tensor | None = None,
) -> Tensor:
    assert (
        causal and cu_seqlens_k.dtype == torch.int32 and window_size[1] == (0 if window_size[0] >= 0 else -1)
    )
    out = torch.full_like(q, torch.nan)
    starts, ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for row in range(len(starts) - 1):
        tokens, length = slice(starts[row], starts[row + 1]), ends[row + 1] - ends[row]
        assert length <= max_seqlen_k and tokens.stop - tokens.start <= max_seqlen_q
        if tokens.stop == tokens.start:
            continue
        if block_table is None:
            keys, values = k[ends[row] : ends[row + 1]], v[ends[row] : ends[row + 1]]
        else:
            keys, values = (paged(x, block_table[row], length) for x in (k, v))
        out[tokens] = attend(q[tokens], keys, values, softmax_scale, window_size[0], softcap)
    return out


def kvcache_forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
) -> Tensor:
    out = torch.full_like(q, torch.nan)
    for row, length in enumerate(cache_seqlens.tolist()):
        if length:
            keys, values = (paged(x, block_table[row], length) for x in (k_cache, v_cache))
            out[row] = attend(q[row], keys, values, softmax_scale, window_size[0], softcap)
    return out


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes a distribution look installed, with stand-ins of its functions."""
    bodies = {
        "flash_attn.cute.interface:_flash_attn_fwd": fa4_forward,
        "fa3_fwd_interface:flash_attn_varlen_func": varlen_forward,
        "flash_attn:flash_attn_varlen_func": varlen_forward,
        "flash_attn:flash_attn_with_kvcache": kvcache_forward,
    }
    present: dict[str, str] = {}
    monkeypatch.setattr(Release, "version", lambda self: present.get(self.distribution))

    def install(distribution: str) -> None:
        present[distribution] = RELEASES[distribution]["version"]
        for path, names in RELEASES[distribution]["functions"].items():
            module, function = path.split(":")
            parts = module.split(".")
            for depth in range(1, len(parts) + 1):
                name = ".".join(parts[:depth])
                if name not in sys.modules:
                    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
            setattr(sys.modules[module], function, with_signature(names, bodies[path]))

    return install


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.key)
def test_every_call_is_in_the_released_signature(library: Library) -> None:
    release = RELEASES[library.release.distribution]
    assert library.release.checked_version == release["version"]
    calls = {
        "fa4": {f"{fa4.MODULE}:{fa4.FUNCTION}": fa4.KEYWORDS},
        "fa3": {f"{fa3.MODULE}:{fa3.FUNCTION}": fa3.KEYWORDS},
    }.get(
        library.key,
        {
            f"{fa2.MODULE}:{fa2.PREFILL}": fa2.PREFILL_KEYWORDS,
            f"{fa2.MODULE}:{fa2.DECODE}": fa2.DECODE_KEYWORDS,
        },
    )
    for function, keywords in calls.items():
        assert set(keywords) <= set(release["functions"][function])


@pytest.mark.parametrize(
    ("distribution", "vendor", "arch", "switch", "served"),
    [
        ("flash-attn-4", "nvidia", "sm90", "", "fa4"),
        ("fa3-fwd", "nvidia", "sm90", "", "fa3"),
        ("flash-attn", "amd", "gfx942", "TRUE", "triton-amd"),
    ],
)
def test_the_adapters_pass_conformance_through_the_stand_ins(
    distribution: str,
    vendor: str,
    arch: str,
    switch: str,
    served: str,
    installed: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(fa2.AMD_TRITON_SWITCH, switch)
    installed(distribution)
    backend = registry.load("flash")
    here = machine(vendor, arch)
    matrix = check_backend(backend, here, dtypes=[torch.bfloat16])
    assert matrix.ok, "\n".join(matrix.lines())
    assert matrix.counts()["pass"] >= 10
    assert backend.attention is not None
    version = RELEASES[distribution]["version"]
    assert backend.attention.served_by(here) == f"flash ({served}, {distribution} {version})"


@pytest.mark.parametrize(("vendor", "arch", "block_size"), [("nvidia", "sm80", 256), ("amd", "gfx942", 128)])
def test_paged_flash_attention_2_agrees_with_the_oracle(
    vendor: str, arch: str, block_size: int, installed: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from backbench.backends.conformance.attention_cases import make_case
    from backbench.backends.conformance.attention_check import AttentionChecker

    monkeypatch.delenv(fa2.AMD_TRITON_SWITCH, raising=False)
    installed("flash-attn")
    torch_backend, flash = registry.load("torch"), registry.load("flash")
    assert torch_backend.attention and torch_backend.operations and flash.attention
    checker = AttentionChecker(
        flash.attention, torch_backend.operations, torch_backend.attention, machine(vendor, arch)
    )
    for shape in ("decode", "mixed", "prefix"):
        for window in (None, 24):
            case = make_case(shape, torch.bfloat16, block_size=block_size, window=window)
            row = checker.check(case)
            assert row.status is Status.PASS, row.detail
    padded = checker.check(make_case("decode", torch.bfloat16, kind="padding", block_size=block_size, pad=3))
    assert padded.status is Status.PASS, padded.detail


def test_the_written_order_and_the_pins(installed: Callable[[str], None]) -> None:
    for distribution in RELEASES:
        installed(distribution)
    flash, pinned = registry.load("flash").attention, registry.load("flash:fa3").attention
    assert flash and pinned
    assert flash.served_by(machine("nvidia", "sm90")).startswith("flash (fa4")
    assert pinned.served_by(machine("nvidia", "sm90")).startswith("flash:fa3 (fa3")
    assert registry.load("flash:fa3").name == "flash:fa3"
    assert flash.served_by(machine("nvidia", "sm80")).startswith("flash (fa2")
    large = replace(SPEC, block_size=256, head_dim=96)
    selection = registry.select(
        "torch",
        device=machine("nvidia", "sm80"),
        specs=[large],
        dtype=torch.bfloat16,
        overrides={"attention": "flash"},
    )
    assert selection.used["attention"] == "flash (fa2, flash-attn 2.8.3.post2)"
    with pytest.raises(BackendError, match="offers flash:fa4, flash:fa3"):
        registry.load("flash:fa5")


def test_what_is_missing_is_one_line_with_every_reason(installed: Callable[[str], None]) -> None:
    attention = registry.load("flash").attention
    assert attention
    with pytest.raises(BackendError) as raised:
        attention.open(SPEC, machine("nvidia", "sm90"))
    text = str(raised.value)
    assert "\n" not in text and "pip install flash-attn-4==4.0.0b36" in text and "sdpa or torch would" in text
    installed("flash-attn")
    reasons = attention.refusals(SPEC, machine("nvidia", "sm80"))
    assert any("fa2: block size 16 is no multiple of 256" in reason for reason in reasons)
    installed("fa3-fwd")
    windowed = replace(SPEC, window=128, dtype=torch.float16, kv_dtype=torch.float16)
    fa3_reasons = next(
        r for r in attention.refusals(windowed, machine("nvidia", "sm90")) if r.startswith("fa3")
    )
    assert "float16 is not torch.bfloat16" in fa3_reasons and "no sliding window" in fa3_reasons


def test_another_signature_is_refused_with_the_version_to_install(
    installed: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed("flash-attn-4")
    monkeypatch.setattr(sys.modules["flash_attn.cute.interface"], "_flash_attn_fwd", lambda q, k, v: None)
    attention = registry.load("flash").attention
    assert attention
    with pytest.raises(BackendError, match=r"takes no .*page_table.*install flash-attn-4==4\.0\.0b36"):
        attention.open(SPEC, machine("nvidia", "sm90"))


def test_fa4_asks_for_a_finite_cache_only_where_pages_load_whole(installed: Callable[[str], None]) -> None:
    installed("flash-attn-4")
    attention = registry.load("flash").attention
    assert attention
    here = machine("nvidia", "sm90")
    assert not attention.open(SPEC, here).finite_cache
    assert attention.open(replace(SPEC, block_size=128), here).finite_cache


def test_prefill_and_decode_mix_over_one_cache(installed: Callable[[str], None]) -> None:
    installed("flash-attn-4")
    backend = registry.load("prefill=flash,decode=torch")
    matrix = check_backend(backend, machine("nvidia", "sm90"), dtypes=[torch.bfloat16])
    assert matrix.ok, "\n".join(matrix.lines())
    assert backend.attention is not None
    assert backend.attention.served_by(machine("nvidia", "sm90")).startswith("prefill=flash (fa4")


def test_flash_runs_on_tritons_cache_through_its_views(installed: Callable[[str], None]) -> None:
    from backbench.backends.conformance import attention_run as runs
    from backbench.backends.conformance.attention_cases import make_case
    from backbench.backends.triton.cache import new_cache

    installed("flash-attn-4")
    attention = registry.load("flash").attention
    assert attention
    setup = runs.set_up(make_case("mixed", torch.bfloat16))
    spec, layout = setup.case.spec, setup.layout
    runner = attention.open(spec, machine("nvidia", "sm90"))
    cpu = torch.device("cpu")
    plain = runs.filled_cache(runner, setup, cpu)
    q, k, v, batch = runs.step_inputs(setup, cpu)
    runner.write(plain, k, v, batch)
    wanted, got = torch.empty_like(q), torch.empty_like(q)
    runner.run(q, plain, batch, wanted)
    foreign = new_cache(layout.num_blocks, spec.kv_heads, spec.block_size, spec.head_dim, spec.kv_dtype, cpu)
    for mine, theirs in zip(plain.blocks(), foreign.blocks(), strict=True):
        theirs.copy_(mine)
    runner.run(q, foreign, batch, got)
    assert torch.equal(wanted, got)


def test_only_libraries_made_for_the_device_are_talked_about() -> None:
    attention = registry.load("flash").attention
    assert attention
    (only,) = attention.refusals(SPEC, device.cpu())
    assert "no library of the family has kernels for" in only
    reasons = attention.refusals(SPEC, machine("amd", "gfx942"))
    assert [reason.split(":")[0] for reason in reasons] == ["ck", "triton-amd"]
    pinned = registry.load("flash:fa4").attention
    assert pinned
    (reason,) = pinned.refusals(SPEC, machine("nvidia", "sm80"))
    assert reason == "fa4: needs sm90 or sm100 or sm103 or sm110, this is sm80"
