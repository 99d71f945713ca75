"""A run beside other work says so, with how much the others took."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from backbench.harness.sensors.cpu import usable_cpus
from backbench.reports.metrics import disturbance, validity
from backbench.reports.page.answer import chips
from backbench.reports.record import RunDirectory
from backbench.reports.verify import verify

BENCH = "import sys; from backbench.harness.cli import main; main(sys.argv[1:])"
SPIN = "import time; end = time.monotonic() + 120\nwhile time.monotonic() < end: pass"


@pytest.mark.slow
def test_a_run_beside_a_spinning_process_is_disturbed(tmp_path: Path) -> None:
    """One spinning process a usable CPU, so that a machine of any size is a busy one."""
    spinning = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in usable_cpus()]
    try:
        load = ("--rate", "8", "--arrival", "constant", "-n", "16")  # 2 s, however fast the machine is
        lengths = ("--input-lengths", "fixed:16", "--output-lengths", "fixed:8", "-o", str(tmp_path / "run"))
        done = subprocess.run(
            [sys.executable, "-c", BENCH, "run", "-w", "synthetic", "-b", "torch", *load, *lengths],
            capture_output=True,
            text=True,
            timeout=240,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    finally:
        for each in spinning:
            each.kill()
            each.wait()
    assert done.returncode == 0, done.stderr
    directory = RunDirectory.open(tmp_path / "run")
    record = directory.read_record()
    assert record.metrics["disturbance"]["others_cpu_share"] > disturbance.MOST_OTHERS
    assert any(each.startswith("other processes took") for each in validity.disturbed(record))
    assert "not valid: disturbed: other processes took" in done.stderr
    assert any(chip.text.startswith("Disturbed: other processes took") for chip in chips(record))
    assert verify(directory) == []
