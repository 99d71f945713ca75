"""A candidate against stored runs: it passes, asks for pairs, or is not comparable; it never regresses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gate.conftest import FakeRunner, changed

from backbench.harness.cli import run_command
from backbench.harness.gate import arms
from backbench.harness.gate.arms import Arm
from backbench.harness.gate.policy import Policy
from backbench.reports.record import RunRecord
from backbench.reports.record.experiment import Experiment, Listed

Typed = Callable[..., tuple[int, str]]


def experiment(folder: Path, runner: FakeRunner | None = None, seeds: tuple[int, ...] = (4, 5, 6)) -> Path:
    """Runs of one arm as `bench run --repeat` leaves them; by default of the baseline's speed."""
    folder.mkdir()
    seeded = lambda record, arm, seed: changed(record, "run.seed", seed)  # noqa: E731
    runner = runner or FakeRunner(change=seeded)
    listed = []
    for block, seed in enumerate(seeds):
        runner(Arm("baseline"), Policy(), seed, folder / str(block))
        listed.append(Listed(str(block), "torch", block, seed, "uuid"))
    Experiment(folder, ("torch",), len(seeds), "bench run", tuple(listed)).write()
    return folder


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Typed:
    """`bench gate` against stored runs; (exit code, its last line)."""
    monkeypatch.chdir(tmp_path)

    def typed(*arguments: str, runner: FakeRunner | None = None) -> tuple[int, str]:
        monkeypatch.setattr(arms, "run_in_process", runner or FakeRunner())
        capsys.readouterr()
        code = run_command(["gate", *arguments])
        return code, capsys.readouterr().err.splitlines()[-1]

    return typed


def test_equal_code_passes_and_replays_the_stored_seeds(bench: Typed, tmp_path: Path) -> None:
    stored, runner = experiment(tmp_path / "night"), FakeRunner()
    code, said = bench("--baseline", str(stored), "--candidate", "--backend sdpa", runner=runner)
    assert code == 0 and said.startswith("PASS: no loss seen: throughput ") and "judges no code" in said
    assert runner.runs == [("candidate", 4), ("candidate", 5), ("candidate", 6)]
    found = json.loads((tmp_path / "gate" / "gate.json").read_text())
    assert found["arms"]["baseline"]["stored"].startswith("night of ") and len(found["pairs"]) == 3
    assert 'name="gate"' in (tmp_path / "gate" / "junit.xml").read_text()
    again = FakeRunner()
    assert bench("--baseline", str(stored), "--candidate", "--backend sdpa", runner=again)[0] == 0
    assert not again.runs


def test_a_loss_asks_for_pairs_with_the_command(bench: Typed, tmp_path: Path) -> None:
    stored = experiment(tmp_path / "night")
    code, said = bench(
        "--baseline", str(stored), "--candidate", "--backend sdpa", runner=FakeRunner(loss=0.1)
    )
    assert code == 3 and said.startswith("INCONCLUSIVE: throughput ") and "worse (margin 3%)" in said
    assert "bench gate --baseline " in said and "--candidate '--backend sdpa'" in said
    assert "regressed" not in (tmp_path / "gate" / "gate.json").read_text()


def test_a_huge_loss_is_still_no_verdict_but_a_floor_is_one(bench: Typed, tmp_path: Path) -> None:
    stored, slow = experiment(tmp_path / "night"), FakeRunner(loss=2.0)
    arguments = ("--baseline", str(stored), "--candidate", "")
    assert bench(*arguments, runner=slow)[0] == 3
    (tmp_path / "bench-gate.toml").write_text("[floors]\nthroughput = 400\n")
    code, said = bench(*arguments, "--out", "floor", runner=slow)
    assert code == 1 and "throughput is 167 tok/s, worse than its floor of 400 tok/s" in said


def test_one_stored_run_is_enough(bench: Typed, tmp_path: Path) -> None:
    stored = experiment(tmp_path / "night") / "1"
    runner = FakeRunner()
    assert bench("--baseline", str(stored), "--candidate", "", runner=runner)[0] == 0
    assert runner.runs == [("candidate", 5)]


def test_both_arms_may_be_stored(bench: Typed, tmp_path: Path) -> None:
    def slow(record: RunRecord, arm: str, seed: int) -> RunRecord:
        seeded = changed(record, "run.seed", seed)
        return changed(seeded, "metrics.output_tokens_per_s.whole_run", 300.0)

    old = experiment(tmp_path / "old")
    new = experiment(tmp_path / "new", FakeRunner(change=slow), seeds=(5, 6, 7))
    runner = FakeRunner()
    code, said = bench("--baseline", str(old), "--candidate", str(new), runner=runner)
    assert code == 3 and "n = 2 against stored runs" in said and not runner.runs
    far = experiment(tmp_path / "far", seeds=(8, 9))
    code, said = bench("--baseline", str(old), "--candidate", str(far), "--out", "b")
    assert code == 2 and "no seed in common" in said


@pytest.mark.parametrize("path", ["system.device.name", "model.dtype", "workload.name"])
def test_another_machine_model_or_workload_is_not_compared(bench: Typed, tmp_path: Path, path: str) -> None:
    stored = experiment(tmp_path / "night")
    runner = FakeRunner(change=lambda record, arm, seed: changed(record, path, "another"))
    code, said = bench("--baseline", str(stored), "--candidate", "", runner=runner)
    assert code == 4 and path in said


def test_what_is_void_or_wrong_is_said(bench: Typed, tmp_path: Path) -> None:
    stored = experiment(tmp_path / "night")
    void = FakeRunner(change=lambda record, arm, seed: changed(record, "validity", ["throttled"]))
    code, said = bench("--baseline", str(stored), "--candidate", "", runner=void)
    assert code == 4 and "no pair counts: candidate: throttled" in said
    bad = FakeRunner(change=lambda record, arm, seed: changed(record, "correctness", {"passed": False}))
    assert bench("--baseline", str(stored), "--candidate", "", "--out", "b", runner=bad)[0] == 5


def test_what_cannot_be_a_baseline_is_one_line(bench: Typed, tmp_path: Path) -> None:
    stored = experiment(tmp_path / "night")
    code, said = bench("--baseline", "", "--candidate", str(stored))
    assert code == 2 and "Stored runs are a gate's baseline" in said
    content: dict[str, Any] = json.loads((stored / "experiment.json").read_text())
    content["runs"][0]["arm"], content["arms"] = "sdpa", ["torch", "sdpa"]
    (stored / "experiment.json").write_text(json.dumps(content))
    code, said = bench("--baseline", str(stored), "--candidate", "")
    assert code == 2 and "runs of 2 arms; name an experiment of one" in said
