"""Settings every test shares, and the table of steps."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from backbench.reports.record import STEP_COLUMNS

pytest_plugins = ["scripted"]

# Without a GPU, Triton kernels run in its interpreter. Triton reads the variable when a kernel is
# decorated, its own library included, so it is set before anything can import Triton.
if not any(Path(node).exists() for node in ("/dev/nvidia0", "/dev/kfd")):
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def make_steps() -> Callable[..., pd.DataFrame]:
    """A step table from partial rows; what is left out is 0 (times in ns)."""

    def make(*rows: dict[str, Any]) -> pd.DataFrame:
        defaults = {name: False if kind == "bool" else 0 for name, kind in STEP_COLUMNS.items()}
        full = [defaults | {"step": i, "kv_blocks_total": 1} | row for i, row in enumerate(rows)]
        return pd.DataFrame(full, columns=list(STEP_COLUMNS)).astype(STEP_COLUMNS)

    return make
