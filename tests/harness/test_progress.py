"""The progress display: on a terminal it says all that matters in one line, elsewhere nothing."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from backbench.harness.progress import Display, eta
from backbench.harness.replay import Progress

TARGET: Any = SimpleNamespace(running=16, waiting=3)


def shown(terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=80)
    with Display(console) as display:
        display.stage("Replaying")
        display.progress(Progress(1000, 4000, 123_456, 16, 50.0), TARGET)
        file: Any = console.file
        return str(file.getvalue())


def test_a_terminal_sees_one_line_within_80_columns() -> None:
    text = shown(terminal=True)
    assert text.count("requests") == 1
    for words in ("1000/4000 requests", "output tok/s", "16 running, 3 waiting", "ETA 2:30"):
        assert words in text


def test_a_pipe_sees_nothing() -> None:
    assert shown(terminal=False) == ""


@pytest.mark.parametrize(
    ("done", "elapsed_s", "text"), [(0, 5.0, "-:--"), (5, -1.0, "-:--"), (5, 10.0, "0:10"), (1, 60.0, "9:00")]
)
def test_eta(done: int, elapsed_s: float, text: str) -> None:
    assert eta(Progress(done, 10, 0, 1, elapsed_s)) == text
