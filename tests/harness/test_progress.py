"""What a run says of how far it is: one moving line on a terminal, plain lines elsewhere, or nothing."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from backbench.errors import HarnessError
from backbench.harness import progress
from backbench.harness.options import Talk
from backbench.harness.progress import Display, Lines, Watcher, eta, open_observer
from backbench.harness.replay import Progress

TARGET: Any = SimpleNamespace(running=16, waiting=3)


def test_a_terminal_sees_one_line_within_80_columns() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with Display(console) as display:
        display.stage("Replaying")
        display.progress(Progress(1000, 4000, 123_456, 16, 50.0), TARGET)
        file: Any = console.file
        text = str(file.getvalue())
    assert text.count("requests") == 1
    for words in ("1000/4000 requests", "output tok/s", "16 running, 3 waiting", "ETA 2:30"):
        assert words in text


def test_a_pipe_sees_a_line_a_stage_and_one_every_ten_seconds() -> None:
    now_s = 100.0
    lines: list[str] = []
    with Lines(lines.append, clock=lambda: now_s) as observer:
        observer.stage("Preparing the workload")
        observer.stage("Replaying")
        for second in range(26):
            now_s = 100.0 + second
            observer.progress(Progress(40 * second, 4000, 40 * second, 16, float(second)), TARGET)
        observer.stage("Checking results")
    assert lines == [
        "[   0.0 s] Preparing the workload",
        "[   0.0 s] Replaying",
        "[  10.0 s] 400 of 4000 requests, 40 output tok/s, 16 running, 3 waiting, 1:30 left",
        "[  20.0 s] 800 of 4000 requests, 40 output tok/s, 16 running, 3 waiting, 1:20 left",
        "[  25.0 s] Checking results",
    ]


def test_quiet_says_nothing_and_verbose_a_line_a_second(capsys: pytest.CaptureFixture[str]) -> None:
    open_observer(Talk(quiet=True)).stage("Replaying")
    assert capsys.readouterr().err == ""
    assert type(open_observer(Talk(quiet=True))) is Watcher
    for talk, every_s in ((Talk(), 10.0), (Talk(verbose=True), 1.0)):
        observer = open_observer(talk)
        assert isinstance(observer, Lines) and observer.every_s == every_s
        observer.stage("Preparing the workload")
        observer.stage("Replaying")
        assert capsys.readouterr().err == ""
        observer.progress(Progress(0, 10, 0, 1, 0.0), TARGET)
        assert capsys.readouterr().err == "[   0.0 s] Preparing the workload\n[   0.0 s] Replaying\n"
    with pytest.raises(HarnessError, match="give one of them"):
        Talk(quiet=True, verbose=True)


def test_what_is_wrong_with_the_request_is_the_only_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(HarnessError), open_observer(Talk()) as observer:
        observer.stage("Preparing the workload")
        raise HarnessError("no such model")
    assert capsys.readouterr().err == ""


def test_a_long_preparation_is_told() -> None:
    now_s = 0.0
    lines: list[str] = []
    observer = Lines(lines.append, clock=lambda: now_s)
    observer.stage("Loading")
    now_s = 60.0
    observer.stage("Capturing graphs")
    assert lines == ["[   0.0 s] Loading", "[  60.0 s] Capturing graphs"]


def test_a_series_is_told_from_its_first_run_on(capsys: pytest.CaptureFixture[str]) -> None:
    observer = open_observer(Talk(), series=True)
    observer.stage("Run 1 of 16: torch, block 1")
    assert capsys.readouterr().err == "[   0.0 s] Run 1 of 16: torch, block 1\n"
    open_observer(Talk(quiet=True), series=True).stage("Run 1 of 16: torch, block 1")
    assert capsys.readouterr().err == ""


def test_a_full_stderr_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(line: str, err: bool) -> None:
        raise OSError(28, "No space left on device")

    silenced: list[int] = []
    monkeypatch.setattr(progress, "echo", full)
    monkeypatch.setattr(progress, "silence", silenced.append)
    observer = open_observer(Talk())
    observer.stage("Preparing the workload")
    observer.progress(Progress(0, 10, 0, 1, 0.0), TARGET)
    assert 2 in silenced


@pytest.mark.parametrize(
    ("done", "elapsed_s", "text"), [(0, 5.0, "-:--"), (5, -1.0, "-:--"), (5, 10.0, "0:10"), (1, 60.0, "9:00")]
)
def test_eta(done: int, elapsed_s: float, text: str) -> None:
    assert eta(Progress(done, 10, 0, 1, elapsed_s)) == text
