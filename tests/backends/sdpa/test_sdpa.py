"""The sdpa backend: conformance, its buckets, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from backbench.backends import registry
from backbench.backends.conformance import Status, check, check_backend
from backbench.backends.interface import Attention, AttentionSpec, Backend, Device, device
from backbench.backends.sdpa import attention
from backbench.backends.sdpa.attention import BUCKET_RATIO, SdpaRunner, buckets
from backbench.errors import BackendError

SPEC = AttentionSpec(8, 2, 64, torch.float32, torch.float32, 16, 0.125)


def test_sdpa_passes_the_quick_level() -> None:
    matrix = check("sdpa", device.detect(prefer="cpu"))
    assert matrix.ok, "\n".join(matrix.lines())
    refused = [row for row in matrix.rows if row.status is Status.REFUSED and "softcap" in row.case]
    assert refused and all("no softcap" in row.detail for row in refused)


def test_results_may_come_in_any_memory_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of torch's kernels return the heads behind the tokens in memory."""
    plain = attention.scaled_dot_product_attention

    def elsewhere(*given: Any, **more: Any) -> torch.Tensor:
        return plain(*given, **more).transpose(-1, -2).contiguous().transpose(-1, -2)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", elsewhere)
    matrix = check("sdpa", device.detect(prefer="cpu"), dtypes=[torch.float32])
    assert matrix.ok, "\n".join(matrix.lines())


def test_the_bucketed_decodes_of_gpus_agree_with_the_oracle_too() -> None:
    cpu = device.detect(prefer="cpu")

    class Bucketed(SdpaRunner):
        def __init__(self, spec: AttentionSpec, device: Device) -> None:
            super().__init__(spec, cpu)
            self.batch_invariant = False

    class Shaped(Attention):
        name = "shaped"

        def refusals(self, spec: AttentionSpec, device: Device) -> list[str]:
            if spec.kv_dtype != spec.dtype:
                return ["no cache in another type"]
            return ["no softcap"] if spec.softcap is not None else []

        def open(self, spec: AttentionSpec, device: Device) -> SdpaRunner:
            return Bucketed(spec, device)

    matrix = check_backend(Backend("shaped", "", attention=Shaped()), cpu)
    assert matrix.ok, "\n".join(matrix.lines())


def test_a_softcap_is_refused_in_one_line_that_names_an_alternative() -> None:
    attention = registry.load("sdpa").attention
    assert attention is not None
    spec = AttentionSpec(8, 2, 64, torch.float32, torch.float32, 16, 0.125, softcap=30.0)
    with pytest.raises(BackendError, match=r"no softcap; torch would") as raised:
        attention.open(spec, device.detect(prefer="cpu"))
    assert "\n" not in str(raised.value)


def test_the_cache_is_the_torch_backends() -> None:
    cpu = device.detect(prefer="cpu")
    runners = []
    for name in ("torch", "sdpa"):
        attention = registry.load(name).attention
        assert attention is not None
        runners.append(attention.open(SPEC, cpu))
    assert type(runners[0].new_cache(2)) is type(runners[1].new_cache(2))
    assert runners[0].cache_bytes_per_block() == runners[1].cache_bytes_per_block()


@given(st.lists(st.integers(1, 5000), max_size=40), st.integers(1, 20_000))
def test_buckets_hold_every_row_once_within_the_bounds(lengths: list[int], most: int) -> None:
    found = list(buckets(range(len(lengths)), lengths, most))
    assert sorted(row for bucket in found for row in bucket) == list(range(len(lengths)))
    for bucket in found:
        held = [lengths[row] for row in bucket]
        assert min(held) >= BUCKET_RATIO * max(held)
        assert len(bucket) == 1 or max(held) * len(bucket) <= most


def test_loading_every_backend_does_not_wait_for_dynamo() -> None:
    """`bench backends` loads them all; torch._dynamo alone takes as long as the rest of torch."""
    code = (
        "import sys; from backbench.backends.registry import load, names\n"
        "for name in names(): load(name)\n"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
