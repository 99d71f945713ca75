"""Settings every test shares, the table of steps, and a browser."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from backbench.reports.record import STEP_COLUMNS, typed

pytest_plugins = ["scripted"]

# Without a GPU, Triton kernels run in its interpreter. Triton reads the variable when a kernel is
# decorated, its own library included, so it is set before anything can import Triton.
if not any(Path(node).exists() for node in ("/dev/nvidia0", "/dev/kfd")):
    os.environ.setdefault("TRITON_INTERPRET", "1")


def load_tool() -> Any:
    """tools/screenshot.py knows where Chromium is and how to start it."""
    path = Path(__file__).parents[1] / "tools" / "screenshot.py"
    spec = importlib.util.spec_from_file_location("screenshot", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium; a CI without it fails."""
    tool = load_tool()
    chromium = tool.find_chromium()
    if chromium is None:
        reason = "No Chromium found (apt-get install chromium, or set CHROMIUM to its path)."
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=list(tool.ARGUMENTS))
        yield running
        running.close()


@pytest.fixture
def make_steps() -> Callable[..., pd.DataFrame]:
    """A step table from partial rows; what is left out is 0 (times in ns)."""

    def make(*rows: dict[str, Any]) -> pd.DataFrame:
        nothing = {"bool": False, "int64?": None}
        defaults = {name: nothing.get(kind, 0) for name, kind in STEP_COLUMNS.items()}
        full = [defaults | {"step": i, "kv_blocks_total": 1} | row for i, row in enumerate(rows)]
        return typed(pd.DataFrame(full, columns=list(STEP_COLUMNS)), STEP_COLUMNS)

    return make
