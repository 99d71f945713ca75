"""Whole gates over a runner that runs nothing: order, looks, voids, budget, resuming, exit codes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gate.conftest import FakeRunner, changed

from backbench.errors import HarnessError
from backbench.harness.gate import session as session_module
from backbench.harness.gate.decision import Verdict
from backbench.harness.gate.outcome import to_markdown
from backbench.harness.gate.policy import Policy
from backbench.harness.gate.session import Session
from backbench.reports.arms import open_arms
from backbench.reports.metrics.validity import NOT_ASKED_FOR, UNCHECKED
from backbench.reports.record import RunRecord
from backbench.reports.record.experiment import read_experiment

Gate = Callable[..., Session]


def test_the_order_is_abba_with_a_new_seed_a_pair(gate: Gate) -> None:
    runner = FakeRunner()
    outcome = gate(runner, policy=Policy(seed=7)).run()
    assert [name[0] for name, _ in runner.runs[:8]] == list("bccbbccb")
    assert [seed for _, seed in runner.runs] == [7 + i // 2 for i in range(len(runner.runs))]
    assert [pair.order[0] for pair in outcome.pairs[:2]] == ["baseline", "candidate"]


def test_good_code_on_a_quiet_machine_passes_at_the_first_look(gate: Gate) -> None:
    outcome = gate(FakeRunner()).run()
    assert (outcome.verdict, outcome.exit_code, len(outcome.pairs)) == (Verdict.PASS, 0, 8)
    assert {each.metric for each in outcome.findings} == {"throughput", "tpot_p50", "ttft_p50"}


def test_a_clear_loss_ends_at_the_first_look(gate: Gate) -> None:
    outcome = gate(FakeRunner(loss=0.1)).run()
    assert (outcome.verdict, outcome.exit_code, len(outcome.pairs)) == (Verdict.REGRESSED, 1, 8)
    assert outcome.findings[0].loss == pytest.approx(0.1, abs=0.02)
    assert "worse" in outcome.reason and "could have seen >=" in outcome.reason


def test_a_gain_passes(gate: Gate) -> None:
    outcome = gate(FakeRunner(loss=-0.1)).run()
    assert outcome.exit_code == 0 and "better" in outcome.reason


def test_a_gate_that_cannot_tell_extends_to_the_last_look(gate: Gate) -> None:
    outcome = gate(FakeRunner(noise=0.1)).run()
    assert (outcome.verdict, outcome.exit_code, len(outcome.pairs)) == (Verdict.INCONCLUSIVE, 3, 16)
    assert {each.verdict for each in outcome.findings} <= {Verdict.INCONCLUSIVE, Verdict.PASS}


def test_a_gate_between_looks_goes_on_to_the_next(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first look asks for more; the second decides."""
    answers = iter([Verdict.EXTEND, Verdict.PASS])
    monkeypatch.setattr(session_module, "overall", lambda findings: next(answers))
    assert len(gate(FakeRunner()).run().pairs) == 12


def test_what_a_decided_gate_left_open_is_inconclusive(gate: Gate) -> None:
    def noisy_ttft(record: RunRecord, arm: str, seed: int) -> RunRecord:
        return changed(record, "metrics.ttft_s.p50.value", 0.1 + 0.05 * ((seed + (arm == "candidate")) % 3))

    outcome = gate(FakeRunner(loss=0.1, change=noisy_ttft)).run()
    found = {each.metric: each.verdict for each in outcome.findings}
    assert outcome.exit_code == 1 and len(outcome.pairs) == 8
    assert (found["throughput"], found["ttft_p50"]) == (Verdict.REGRESSED, Verdict.INCONCLUSIVE)
    assert "ttft" not in outcome.reason


def test_void_pairs_do_not_count_and_keep_the_order_balanced(gate: Gate) -> None:
    def disturbed(record: RunRecord, arm: str, seed: int) -> RunRecord:
        return replace(record, validity=["another process took the CPU"]) if seed in (1, 4) else record

    outcome = gate(FakeRunner(change=disturbed)).run()
    void = [pair for pair in outcome.pairs if pair.void]
    assert [pair.seed for pair in void] == [1, 4]
    assert len(outcome.pairs) == 10 and {each.pairs for each in outcome.findings} == {8}
    forward = [pair.order[0] == "baseline" for pair in outcome.pairs if not pair.void]
    assert forward == [True, False] * 4


def test_a_machine_that_voids_every_pair_is_given_up_early(gate: Gate) -> None:
    runner = FakeRunner(change=lambda record, arm, seed: replace(record, validity=["throttled"]))
    outcome = gate(runner).run()
    assert (outcome.verdict, outcome.exit_code, len(outcome.pairs)) == (Verdict.INVALID, 4, 3)
    assert "throttled" in outcome.reason


def test_too_many_void_pairs_end_the_gate(gate: Gate) -> None:
    def mostly(record: RunRecord, arm: str, seed: int) -> RunRecord:
        return replace(record, validity=["throttled"]) if seed % 4 else record

    outcome = gate(FakeRunner(change=mostly)).run()
    assert outcome.exit_code == 4 and sum(bool(pair.void) for pair in outcome.pairs) == 8


def test_wrong_results_end_the_gate_at_once(gate: Gate) -> None:
    def wrong(record: RunRecord, arm: str, seed: int) -> RunRecord:
        bad = {"passed": False, "reason": "log-probabilities differ by 0.3"}
        return replace(record, correctness=bad) if (arm, seed) == ("candidate", 2) else record

    outcome = gate(FakeRunner(change=wrong)).run()
    assert (outcome.exit_code, len(outcome.pairs)) == (5, 3)
    assert "log-probabilities differ by 0.3" in outcome.reason


@pytest.mark.parametrize(
    ("path", "value"),
    [("model.dtype", "bfloat16"), ("system.device.name", "another"), ("metrics.context.gpus", 2)],
)
def test_arms_that_run_something_else_are_not_compared(gate: Gate, path: str, value: Any) -> None:
    def other(record: RunRecord, arm: str, seed: int) -> RunRecord:
        return changed(record, path, value) if arm == "candidate" else record

    outcome = gate(FakeRunner(change=other)).run()
    assert (outcome.exit_code, len(outcome.pairs)) == (4, 1)
    assert path in outcome.reason


def test_other_software_is_shown_and_compared(gate: Gate) -> None:
    def newer(record: RunRecord, arm: str, seed: int) -> RunRecord:
        return changed(record, "software.packages", {"torch": arm})

    outcome = gate(FakeRunner(change=newer)).run()
    assert outcome.exit_code == 0
    summary = to_markdown(outcome)
    assert "- software.packages.torch differs: baseline vs candidate" in summary
    assert "- with " in summary and "software.python " in summary


def test_a_gate_is_an_experiment_of_its_valid_pairs(gate: Gate) -> None:
    """So that show, verify, compare and report take its directory."""
    runner = FakeRunner(change=lambda r, arm, seed: replace(r, validity=["throttled"]) if seed == 2 else r)
    session = gate(runner)
    session.run()
    found = read_experiment(session.out)
    assert (found.arms, found.blocks, len(found.runs)) == (
        ("baseline", "candidate"),
        8,
        16,
    ) and found.finished
    assert [run.seed for run in found.runs[2:6]] == [1, 1, 3, 3]
    assert found.directory(found.runs[4]).read_record().workload["content_hash"] == f"{3:064d}"
    labels = [arm.label for arm in open_arms([session.out])]
    assert labels == ["baseline", "candidate"]


def test_clocks_that_differ_between_the_arms_void_the_pair(gate: Gate) -> None:
    runner = FakeRunner(clock_mhz=lambda arm, seed: 1900 - (60 if (arm, seed) == ("candidate", 1) else 30))
    outcome = gate(runner).run()
    assert [pair.void for pair in outcome.pairs if not pair.void] == [()] * 8
    assert outcome.pairs[1].void == ()  # 1.6 %
    runner = FakeRunner(clock_mhz=lambda arm, seed: 1900 - (60 if arm == "candidate" else 0))
    shutil.rmtree(gate(runner).out)
    assert "clocks differ: 1900 vs 1840 MHz" in gate(runner).run().reason  # 3.3 %


class Clock:
    """Every look at it takes a minute."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 60.0
        return self.now


@pytest.mark.parametrize(("minutes", "code"), [(10, 3), (30, 0)])
def test_the_budget_ends_a_gate_and_is_its_last_look(
    gate: Gate, monkeypatch: pytest.MonkeyPatch, minutes: float, code: int
) -> None:
    """Three minutes a pair: 10 minutes are over before the sixth pair, 30 minutes before the eleventh."""
    monkeypatch.setattr(session_module, "LOOKS", (16,))
    monkeypatch.setattr(session_module, "time", Clock())
    outcome = gate(FakeRunner(), max_minutes=minutes).run()
    assert outcome.exit_code == code
    assert (len(outcome.pairs) < 6) == (code == 3)
    assert code == 0 or "minutes were over" in outcome.reason


def test_no_pair_is_begun_that_may_end_after_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(session_module, "time", clock)
    budget = session_module.Budget(minutes=10)
    with budget.spending():
        clock.now += 3 * 60
    assert budget.longest_s == 4 * 60  # looking takes one, too
    clock.now = budget.started + 4 * 60
    assert not budget.spent  # 5 + 4 minutes
    clock.now = budget.started + 6 * 60
    assert budget.spent  # 7 + 4 minutes
    assert not session_module.Budget().spent


class Killed(BaseException):
    """As SIGKILL: nothing after it runs."""


@pytest.mark.parametrize("runs", [1, 4, 9, 15])
def test_a_killed_gate_goes_on_with_its_finished_pairs(gate: Gate, runs: int) -> None:
    calls = FakeRunner(loss=0.1)

    def dies(*arguments: Any) -> Any:
        if len(calls.runs) == runs:
            arguments[-1].mkdir()  # begun, nothing written
            raise Killed
        return calls(*arguments)

    with pytest.raises(Killed):
        gate(dies).run()
    again = FakeRunner(loss=0.1)
    resumed = gate(again).run()
    assert len(again.runs) == 16 - 2 * (runs // 2)  # half a pair is run again
    shutil.rmtree(gate(again).out)
    whole = gate(FakeRunner(loss=0.1)).run()
    assert resumed.pairs == whole.pairs and resumed.findings == whole.findings


def test_a_gate_killed_twice_uses_what_the_second_try_finished(gate: Gate) -> None:
    first, second, third = FakeRunner(), FakeRunner(), FakeRunner()

    def stop_after(runner: FakeRunner, runs: int) -> Callable[..., Any]:
        def measure(*arguments: Any) -> Any:
            if len(runner.runs) == runs:
                raise Killed
            return runner(*arguments)

        return measure

    for runner, runs in ((first, 1), (second, 3)):
        with pytest.raises(Killed):
            gate(stop_after(runner, runs)).run()
    gate(third).run()
    assert len(third.runs) == 14


def test_a_tampered_run_is_run_again(gate: Gate) -> None:
    outcome = gate(FakeRunner(loss=0.1)).run()
    file = gate(FakeRunner()).out / "pairs" / "03" / "candidate" / "run.json"
    content = json.loads(file.read_text())
    content["metrics"]["output_tokens_per_s"]["whole_run"] *= 2
    file.write_text(json.dumps(content))
    again = FakeRunner(loss=0.1)
    assert gate(again).run().pairs == outcome.pairs
    assert [seed for _, seed in again.runs] == [3, 3]


def test_a_directory_holds_one_gate(gate: Gate, tmp_path: Path) -> None:
    gate(FakeRunner()).run()
    with pytest.raises(HarnessError, match="another policy"):
        gate(FakeRunner(), policy=Policy(seed=1)).run()
    plan = tmp_path / "gate" / "plan.json"
    plan.write_text(json.dumps(json.loads(plan.read_text()) | {"host": "elsewhere"}))
    with pytest.raises(HarnessError, match="another host"):
        gate(FakeRunner()).run()
    plan.unlink()
    with pytest.raises(HarnessError, match="not empty"):
        gate(FakeRunner()).run()


def test_a_metric_that_no_run_measured_is_named(gate: Gate) -> None:
    policy = Policy(margins={"throughput": 0.03, "joules_per_token": 0.05})
    outcome = gate(FakeRunner(), policy=policy).run()
    assert outcome.not_measured == ("joules_per_token",) and outcome.exit_code == 0
    shutil.rmtree(gate(FakeRunner()).out)
    outcome = gate(FakeRunner(), policy=Policy(margins={"joules_per_token": 0.05})).run()
    assert outcome.exit_code == 4


def test_a_machine_known_to_see_too_little_is_refused_after_one_pair(gate: Gate) -> None:
    outcome = gate(FakeRunner(), blind=lambda machine: f"cannot see on {machine.digest}").run()
    assert (outcome.exit_code, len(outcome.pairs)) == (4, 1)
    assert outcome.reason.startswith("cannot see on ")


def unchecked_as_asked(runs: list[tuple[str, bool]]) -> Callable[..., Any]:
    """A runner that checks a run's results unless it is told not to; keeps (arm, whether it did)."""
    fake = FakeRunner()

    def measure(arm: Any, policy: Policy, seed: int, out: Path) -> Any:
        checks = "--no-check" not in arm.options
        runs.append((arm.name, checks))
        reason = {"passed": None, "reason": NOT_ASKED_FOR}
        fake.change = lambda record, _, __: (
            record if checks else replace(record, correctness=reason, validity=[UNCHECKED])
        )
        return fake(arm, policy, seed, out)

    return measure


def test_results_are_checked_in_the_first_run_of_an_arm_where_the_policy_says_so(gate: Gate) -> None:
    runs: list[tuple[str, bool]] = []
    outcome = gate(unchecked_as_asked(runs), policy=Policy(check="first")).run()
    assert outcome.exit_code == 0 and not any(pair.void for pair in outcome.pairs)
    assert [checks for _, checks in runs] == [True] * 2 + [False] * 14
    again: list[tuple[str, bool]] = []
    assert gate(unchecked_as_asked(again), policy=Policy(check="first")).run().pairs == outcome.pairs
    assert not again  # resumed: runs that were not to be checked are finished ones
    shutil.rmtree(gate(FakeRunner()).out)
    gate(unchecked_as_asked(again)).run()
    assert all(checks for _, checks in again)


def test_results_are_checked_until_a_pair_of_runs_passes(gate: Gate) -> None:
    def cut_short(record: RunRecord, arm: str, seed: int) -> RunRecord:
        cut = changed(replace(record, correctness={"passed": None}), "run.status", "failed")
        return cut if seed == 0 and arm == "candidate" else record

    asked: list[tuple[str, ...]] = []
    fake = FakeRunner(change=cut_short)

    def measure(arm: Any, *rest: Any) -> Any:
        asked.append(arm.options)
        return fake(arm, *rest)

    gate(measure, policy=Policy(check="first")).run()
    assert ["--no-check" in options for options in asked[:6]] == [False] * 4 + [True] * 2


@pytest.mark.parametrize(
    ("floors", "words"),
    [
        ({"throughput": 490.0}, "throughput is 250 tok/s, worse than its floor of 490 tok/s"),
        ({"tpot_p50": 0.03}, "tpot_p50 is 40.0 ms, worse than the 30.0 ms that it may be at most"),
    ],
)
def test_a_broken_floor_fails_with_its_figure_before_any_look(
    gate: Gate, floors: dict[str, float], words: str
) -> None:
    """Three pairs cannot tell a loss from noise; a candidate half as fast is below any floor."""
    outcome = gate(FakeRunner(loss=1.0, noise=0.001), policy=Policy(floors=floors)).run()
    assert (outcome.verdict, outcome.exit_code, len(outcome.pairs)) == (Verdict.REGRESSED, 1, 3)
    assert words in outcome.reason and "median of 3 runs; the baseline's" in outcome.reason


def test_a_floor_that_holds_changes_nothing(gate: Gate) -> None:
    floors = {"throughput": 400.0, "tpot_p50": 0.03, "peak_memory": 2.0**60}
    assert gate(FakeRunner(), policy=Policy(floors=floors)).run().exit_code == 0


def test_a_rate_that_fell_to_nothing_fails(gate: Gate) -> None:
    def none_met(record: RunRecord, arm: str, seed: int) -> RunRecord:
        return changed(record, "metrics.goodput_requests_per_s", 0.0 if arm == "candidate" else 3.0)

    policy = Policy(margins={"throughput": 0.03, "goodput": 0.03})
    outcome = gate(FakeRunner(change=none_met), policy=policy).run()
    assert outcome.exit_code == 1 and "goodput is 0 req/s, at its floor of 0 req/s" in outcome.reason
