"""Attention kernels of less usual geometries fit their GPU; the usual ones are in `bench portability`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from backbench.backends.aot.compile import Resources, compile_kernel, gpu_target
from backbench.errors import BackendError

SCRIPT = Path(__file__).with_name("attention_aot.py")


def compiled(target: str, spec: str) -> dict[str, Any]:
    """Kernel -> resources, from a process without the interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    result = subprocess.run(
        [sys.executable, str(SCRIPT), target, spec], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["block64", "dim80", "dim256", "fp8"])
@pytest.mark.parametrize("target", ["sm90", "gfx942"])
def test_other_geometries_fit(target: str, spec: str) -> None:
    for name, kernel in compiled(target, spec).items():
        assert kernel["fits"], f"{name}: {kernel['shared_bytes']} bytes of shared memory"
        if name != "write":
            assert kernel["matrix_instructions"] > 0, f"{name} uses no matrix instruction"


@pytest.mark.slow
def test_hopper_prefill_uses_warp_group_instructions() -> None:
    kinds = compiled("sm90", "block64")["prefill"]["kinds"]
    assert all("wgmma" in kind for kind in kinds)


def test_unknown_target_names_the_known_ones() -> None:
    with pytest.raises(BackendError, match="sm90"):
        gpu_target("sm42")


def test_interpreted_kernels_are_refused() -> None:
    with pytest.raises(BackendError, match="TRITON_INTERPRET"):
        compile_kernel(object(), {}, {}, "sm90")


def test_shared_memory_limit_is_the_targets() -> None:
    resources = Resources("gfx942", 100, 0, 70_000, 1, (), "")
    assert not resources.fits
    assert Resources("sm90", 100, 0, 70_000, 1, (), "").fits
