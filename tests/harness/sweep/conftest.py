"""Sweeps of small scripted runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backbench.harness.sweep.campaign import read_campaign
from backbench.harness.sweep.cells import plan
from backbench.reports.record.sweep import Sweep

LOAD = {
    "workload": "synthetic",
    "num_requests": 6,
    "input_lengths": "fixed:8",
    "output_lengths": "fixed:5",
}

MakeSweep = Callable[..., Sweep]


@pytest.fixture
def make_sweep(tmp_path: Path) -> MakeSweep:
    """Plans a matrix into a directory below tmp_path; further options are the base's."""

    def make(matrix: dict[str, list[Any]], out: str = "sweep", repeats: int = 1, **base: Any) -> Sweep:
        lines = [f"repeats = {repeats}", "[base]"]
        lines += [f"{name} = {json.dumps(value)}" for name, value in (LOAD | base).items()]
        lines += ["[matrix]", *(f"{name} = {json.dumps(values)}" for name, values in matrix.items())]
        file = tmp_path / "campaign.toml"
        file.write_text("\n".join(lines))
        return plan(read_campaign(file), tmp_path / out, "bench sweep campaign.toml")

    return make
