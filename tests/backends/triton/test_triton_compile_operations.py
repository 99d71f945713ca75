"""Every operation and product kernel builds for every supported GPU, fits it and spills nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
QUICK = ("sm90", "gfx942")
OTHERS = ("sm80", "sm89", "sm100", "sm120", "gfx90a", "gfx950", "gfx1100", "gfx1201")


@pytest.mark.parametrize("target", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_kernels_compile(target: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_operations.py")), target],
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-1500:]
    assert done.stdout.count("\n") == 13
