"""`bench gate`, `bench calibrate` and `bench trend` as they are typed; no run is really made."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from gate.conftest import FakeRunner

from backbench.harness.cli import run_command
from backbench.harness.commands import gate as commands
from backbench.harness.gate import arms
from backbench.harness.gate.outcome import EXIT_CODES
from backbench.harness.gate.policy import Policy, read_policy

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
    assert code == 0 and len(json.loads(out)["gates"]) == 6 and json.loads(out)["changes"] == []
    assert bench("trend", "nowhere")[0] == 2


PAGE = (Path(__file__).parents[3] / "docs" / "gate.md").read_text(encoding="utf-8")


def test_the_pages_commands_have_the_options_they_are_given() -> None:
    lines = re.findall(r"\bbench (gate|calibrate|trend)\b([^`#|\n]*)", PAGE)
    assert len(lines) >= 8
    for name, rest in lines:
        command = getattr(commands, name)
        known = {each for parameter in command.params for each in parameter.opts}
        given = re.findall(r"(?<![\"\w])--[a-z-]+", rest.replace("--backend", ""))
        assert set(given) <= known, (name, given)


def test_the_pages_policy_is_one(tmp_path: Path) -> None:
    runs, kernels = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "bench-gate.toml").write_text(runs)
    found = read_policy(tmp_path / "bench-gate.toml")
    assert found.margins == Policy().margins and found.check == Policy().check and len(found.floors) == 2
    (tmp_path / "bench-gate.toml").write_text(kernels)
    assert read_policy(tmp_path / "bench-gate.toml").margins == {"kernel_time": 0.05}


def test_the_pages_exit_codes_are_the_commands() -> None:
    told = {word: int(code) for code, word in re.findall(r"^\| (\d) \| ([\w ]+) \|", PAGE, re.MULTILINE)}
    told.pop("wrong results")
    assert told == {str(verdict): code for verdict, code in EXIT_CODES.items()}
