"""Every launch is bound once, and hands the driver what Triton's own launch does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from backbench.backends.interface import Device
from backbench.backends.interface.device import cpu
from backbench.backends.triton.launch import Place, argument_kind, parts, place_of, power_of_two

SCRIPT = Path(__file__).with_name("launch_recorder.py")


@pytest.mark.slow
def test_bound_launches_equal_tritons_own() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    result = subprocess.run([sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    launches = json.loads(result.stdout)
    assert len(launches) == 28, "every kernel"
    for kernel, found in launches.items():
        assert found == {"equal": True, "other_binary": True}, kernel


def test_kinds_differ_where_triton_would_compile_another_binary() -> None:
    values = torch.zeros(64, dtype=torch.float32)
    assert argument_kind(values) == argument_kind(values[4:])
    different = [values, values[1:], values.half(), 1, 16, 7, 2**31 + 16, 0.5]
    assert len({argument_kind(value) for value in different}) == len(different)
    assert argument_kind(7) == argument_kind(9)


@pytest.mark.parametrize(
    ("arch", "overlaps", "ptx"),
    [("sm80", False, True), ("sm90", True, True), ("sm121", True, True), ("gfx942", False, False)],
)
def test_a_place_knows_what_its_gpu_can_do(arch: str, overlaps: bool, ptx: bool) -> None:
    vendor = "nvidia" if ptx else "amd"
    place = Place.of(Device(vendor, arch, arch, 132, 2**36, 2**16, torch.device("cpu")))
    assert (place.overlaps, place.speaks_ptx, place.interpreted) == (overlaps, ptx, False)


def test_the_interpreter_is_a_place_of_its_own() -> None:
    for place in (Place.of(cpu(interpret=True)), place_of(torch.device("cpu"))):
        assert place.interpreted and place.units == 1
        assert not place.overlaps and not place.speaks_ptx


def test_sizes() -> None:
    assert [power_of_two(number) for number in (0, 1, 2, 3, 4096, 4097)] == [1, 1, 2, 4, 4096, 8192]
    assert [parts(number, 4) for number in (0, 1, 4, 5)] == [0, 1, 1, 2]
