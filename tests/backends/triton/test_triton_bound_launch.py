"""A bound launch hands the driver what Triton's own launch does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from backbench.backends.triton.bound_launch import argument_kind

SCRIPT = Path(__file__).with_name("launch_recorder.py")


@pytest.mark.slow
def test_bound_launches_equal_tritons_own() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    result = subprocess.run([sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    for kind, found in json.loads(result.stdout).items():
        assert found == {"equal": True, "other_binary": True}, kind


def test_kinds_differ_where_triton_would_compile_another_binary() -> None:
    values = torch.zeros(64, dtype=torch.float32)
    assert argument_kind(values) == argument_kind(values[4:])
    different = [values, values[1:], values.half(), 1, 16, 7, 2**31 + 16, 0.5]
    assert len({argument_kind(value) for value in different}) == len(different)
    assert argument_kind(7) == argument_kind(9)
