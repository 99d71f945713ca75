"""`bench workloads NAME|FILE`: drawn before anything runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from backbench.harness.cli import run_command

VIDUR = "arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,10,20\n1.25,20000,40\n"


def bench(*arguments: object) -> int:
    try:
        return run_command([*map(str, arguments)])
    except SystemExit as end:
        return int(end.code or 0)


def test_a_trace_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "trace.csv").write_text(VIDUR)
    assert bench("workloads", tmp_path / "trace.csv") == 0
    told = capsys.readouterr().out
    assert "trace.csv: 2 requests, at recorded times, the last due after 0:00:01" in told
    assert "Arrivals: 0.800 requests/s" in told and "█" in told
    assert "Prefixes: an unlimited cache with blocks of 16 tokens would hold 0.0%" in told


def test_options_of_a_run_hold_and_a_models_context_cuts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "trace.csv").write_text(VIDUR)
    page = tmp_path / "page.html"
    ask = ("workloads", tmp_path / "trace.csv", "-m", "tiny", "--rate", 5, "--json", "--html", page)
    assert bench(*ask) == 0
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert found["parameters"]["offered"]["arrival"] == "poisson"
    assert found["clipped"]["requests"] == 1
    assert "Page:" in told.err and page.read_text().startswith("<!doctype html>")


def test_a_named_workload_is_drawn_with_a_thousand_requests(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("workloads", "azure-conv", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["requests"] == 1000 and found["arrivals"]["gap_cv"] > 0.5
    assert bench("workloads", "mix:sharegpt=1,synthetic=1", "-n", 20, "--arrival", "bursts:5:1:1") == 0
    assert "sharegpt (" in capsys.readouterr().out


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (("--rate", 5), "name one, such as `bench workloads azure-conv`"),
        (("azure-conf",), "did you mean azure-conv"),
        (("synthetic", "--arrival", "gamma", "--rate", 4), "needs --cv between"),
        (("synthetic", "--block-size", 0), "--block-size"),
    ):
        assert bench("workloads", *arguments) == 2
        told = capsys.readouterr().err
        assert words in told and told.count("\n") == 1
