"""`bench kernels --kinds all_reduce`: sums between processes of this CPU."""

from __future__ import annotations

import json

import pytest

from backbench.harness.cli import run_command


def test_sums_are_timed_and_right_and_who_cannot_sum_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["kernels", "--kinds", "all_reduce", "--backend", "torch,triton,sdpa", "--model", "tiny"]
    assert run_command([*arguments, "--tokens", "1,16", "--device", "cpu", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["problem"], row["backend"]) for row in rows] == [
        (problem, backend)
        for problem in ("m1 1 KiB, 2 devices", "m16 16 KiB, 2 devices")
        for backend in ("torch", "triton", "sdpa")
    ]
    for row in rows:
        if row["backend"] == "torch":
            assert row["mode"] == "eager" and row["median_s"] > 0 and row["rounds"] == 8
            assert row["correct"] is True and 0 <= row["error"] <= row["limit"]
        else:
            assert row["median_s"] is None and row["correct"] is None
    notes = {row["backend"]: row["note"] for row in rows}
    assert "needs an NVIDIA or AMD GPU" in notes["triton"]
    assert notes["sdpa"] == "collectives are served by torch"
