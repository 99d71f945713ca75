"""`bench backends --check`: the matrix on stdout, 5 where a result is wrong."""

from __future__ import annotations

import json

import pytest

from backbench.backends import conformance
from backbench.backends.conformance import CheckRow, ConformanceMatrix, Status
from backbench.harness.cli import run_command


def fake_check(status: Status) -> object:
    row = CheckRow("attention", "decode", "float32", status, "off by 1", 1.0, 0.1)
    return lambda name, device, *, level: ConformanceMatrix(name, "cpu", "x86_64", level, (row,))


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
