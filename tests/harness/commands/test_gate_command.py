"""`bench gate`, `bench calibrate` and `bench trend` as they are typed; no run is really made."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from gate.conftest import FakeRunner

from backbench.harness.cli import run_command
from backbench.harness.gate import arms

Typed = Callable[..., tuple[int, str, str]]
ARMS = ("--baseline", "--backend torch", "--candidate", "--backend sdpa")


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Typed:
    """The command in `tmp_path` with a runner in place of processes; (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def typed(*arguments: str, runner: FakeRunner | None = None) -> tuple[int, str, str]:
        monkeypatch.setattr(arms, "run_in_process", runner or FakeRunner())
        capsys.readouterr()
        code = run_command(list(arguments))
        return code, *capsys.readouterr()

    return typed


def test_a_gate_prints_its_summary_and_leaves_its_files(bench: Typed, tmp_path: Path) -> None:
    code, out, err = bench("gate", *ARMS)
    assert code == 0 and out.startswith("**PASS: ") and "could have seen >=" in out
    assert err.splitlines()[0] == "pair 1: valid" and err.splitlines()[-1].startswith("PASS: ")
    assert {"gate.json", "junit.xml", "summary.md", "plan.json", "pairs"} <= {
        file.name for file in (tmp_path / "gate").iterdir()
    }


def test_exit_codes(bench: Typed) -> None:
    assert bench("gate", *ARMS, "--out", "slow", runner=FakeRunner(loss=0.1))[0] == 1
    assert bench("gate", *ARMS, "--out", "noisy", runner=FakeRunner(noise=0.2))[0] == 3
    code, out, _ = bench("gate", *ARMS, "--out", "json", "--json")
    assert code == 0 and json.loads(out)["verdict"] == "pass"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--baseline", "nonesuch", "--candidate", ""), "none of them"),
        ((*ARMS, "--policy", "none.toml"), "none.toml cannot be read"),
        ((*ARMS, "--calibration", "none.json"), "none.json cannot be read"),
        ((*ARMS, "--max-minutes", "0"), "max-minutes"),
        (("--baseline", "--backend torch"), "candidate"),
    ],
)
def test_bad_input_is_one_line(bench: Typed, arguments: tuple[str, ...], words: str) -> None:
    code, _, err = bench("gate", *arguments)
    assert code == 2 and words in err and len(err.splitlines()) == 1 and len(err) < 300


def test_the_policy_of_the_working_directory_counts(bench: Typed, tmp_path: Path) -> None:
    (tmp_path / "bench-gate.toml").write_text("[margins]\nthroughput = 0.2\n")
    assert bench("gate", *ARMS, runner=FakeRunner(loss=0.1))[0] == 0


def test_a_calibration_keeps_a_gate_from_what_it_cannot_see(bench: Typed, tmp_path: Path) -> None:
    noisy = FakeRunner(noise=0.05)
    code, out, _ = bench("calibrate", "--arm", "--backend torch", "--pairs", "6", runner=noisy)
    assert code == 0 and "| throughput | " in out and "bench-calibration.json" in out
    code, _, err = bench("gate", *ARMS, runner=noisy)
    assert code == 4 and "INVALID: cannot see its margins here" in err
    # Another baseline is another cell, of which nothing is known.
    assert bench("gate", "--baseline", "", "--candidate", "", "--out", "other")[0] == 0
    code, out, _ = bench("calibrate", "--pairs", "6", "--out", "again", "--json")
    assert code == 0 and json.loads(out)["metrics"]["throughput"]["pairs"] == 6
    assert len(json.loads((tmp_path / "bench-calibration.json").read_text())["cells"]) == 2


def test_trend_shows_gates_and_never_fails_a_build(bench: Typed) -> None:
    bench("gate", *ARMS, "--out", "history/1")
    bench("gate", *ARMS, "--out", "history/2", runner=FakeRunner(loss=0.1))
    code, out, _ = bench("trend", "history")
    assert code == 0 and "| regressed |" in out and "| pass |" in out
    code, out, _ = bench("trend", "history", "--json")
    assert code == 0 and len(json.loads(out)) == 6
    assert bench("trend", "nowhere")[0] == 2
