"""A run whose model several devices of this CPU share, and one that loses a device."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from backbench.harness.cli import run_command
from backbench.harness.subjects.engine import EngineTarget
from backbench.reports.record import RunDirectory
from backbench.reports.verify import verify

SHORT = (
    *("run", "-w", "synthetic", "--input-lengths", "fixed:8", "--output-lengths", "fixed:6", "-b", "torch"),
    *("-n", "8", "--warmup", "1", "--max-len", "64", "--max-step-tokens", "64"),
)


def exit_code(*arguments: str) -> int:
    """Of a short run of the bundled model."""
    try:
        return run_command([*SHORT, *arguments])
    except SystemExit as stop:
        return int(stop.code or 0)


def lose_a_rank(
    *arguments: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a run measured is kept when its second process is killed after three answers."""
    poll, finished = EngineTarget.poll, 0

    def killing(target: EngineTarget, deadline_ns: int | None) -> Any:
        nonlocal finished
        events = poll(target, deadline_ns)
        finished += sum(event.finished for event in events)
        if finished >= 3 and target.engine.ranks is not None:
            os.kill(target.engine.ranks.team.pids[0], signal.SIGKILL)
        return events

    monkeypatch.setattr(EngineTarget, "poll", killing)
    assert exit_code(*arguments, "-o", str(folder)) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: Rank 1 of 2 (process ") and last.endswith("it was ended by SIGKILL")
    directory = RunDirectory.open(folder)
    record = directory.read_record()
    assert record.run["status"] == "failed" and "Rank 1 of 2" in record.run["error"]
    assert record.metrics["counts"]["completed"] >= 1
    assert verify(directory) == []
