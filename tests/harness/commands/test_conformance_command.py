"""`bench backends --check`: the matrix on stdout, 5 where a result is wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest

from backbench.backends import conformance
from backbench.backends.conformance import CheckRow, ConformanceMatrix, Status
from backbench.harness.cli import run_command


def fake_check(status: Status) -> object:
    row = CheckRow("attention", "decode", "float32", status, "off by 1", 1.0, 0.1)

    def check(name: str, device: Any, *, level: str, on_row: Any) -> ConformanceMatrix:
        on_row(row, 1)
        return ConformanceMatrix(name, "cpu", "x86_64", level, (row,))

    return check


def test_a_wrong_case_ends_with_5_and_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(conformance, "check", fake_check(Status.WRONG))
    assert run_command(["backends", "--check", "sdpa"]) == 5
    assert "WRONG    attention  float32   decode: off by 1" in capsys.readouterr().out


def test_json_holds_the_matrix(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(conformance, "check", fake_check(Status.PASS))
    assert run_command(["backends", "--check", "sdpa", "--full", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["level"] == "full" and printed["counts"]["pass"] == 1


def test_an_unknown_backend_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["backends", "--check", "spda"]) == 2
    assert "did you mean sdpa" in capsys.readouterr().err


def test_progress_goes_to_stderr_in_a_few_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["backends", "--check", "torch", "--json"]) == 0
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    total = json.loads(printed.out)["cases"]
    assert len(lines) == 10 and total > 100
    assert lines[-1].startswith(f"{total} of {total} cases: operations bfloat16 ")


def interrupted_check(name: str, device: Any, *, level: str, on_row: Any) -> ConformanceMatrix:
    on_row(CheckRow("attention", "decode", "float32", Status.PASS, "", 1e-7, 1e-6), 40)
    on_row(CheckRow("attention", "mixed", "float32", Status.WRONG, "off by 1", 1.0, 0.1), 40)
    raise KeyboardInterrupt


def test_an_interruption_prints_what_there_is_so_far(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(conformance, "check", interrupted_check)
    assert run_command(["backends", "--check", "sdpa"]) == 130
    printed = capsys.readouterr()
    assert "WRONG    attention  float32   mixed: off by 1" in printed.out
    assert "pass     attention  float32   decode" in printed.out
    assert "interrupted after 2 of 40 cases" in printed.err
    assert run_command(["backends", "--check", "sdpa", "--json"]) == 130
    stored = json.loads(capsys.readouterr().out)
    assert stored["interrupted"] is True and len(stored["rows"]) == 2 and stored["cases"] == 40
