"""Gates of kernels: over turns that are made up, and over real ones with a planted slow kernel."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backbench.errors import HarnessError
from backbench.harness.cli import run_command
from backbench.harness.gate.arms import BASELINE, CANDIDATE, HERE, Arm
from backbench.harness.gate.calibration import calibrate
from backbench.harness.gate.decision import Verdict
from backbench.harness.gate.kernels import InProcesses, KernelSession, Taken
from backbench.harness.gate.policy import KERNEL_TIME, Policy

FACTS: dict[str, Any] = {
    "system": {"device": {"name": "card"}, "cpu": {"name": "cpu", "cores_usable": 2}},
    "software": {"packages": {"torch": "2"}},
    "dtype": "torch.float32",
    "wrong": [],
    "refused": {},
}
POLICY = Policy(kernels=(), margins={KERNEL_TIME: 0.05})


@dataclass
class MadeUp:
    """Turns of two kernels; `loss` slows the candidate's second one down."""

    loss: float = 0.0
    noise: float = 0.01
    facts: Callable[[str], dict[str, Any]] = lambda arm: FACTS
    modes: Sequence[str] = ("eager",)
    orders: list[Sequence[str]] = field(default_factory=list)

    def __call__(self, order: Sequence[str]) -> Taken:
        rng = np.random.default_rng(len(self.orders))
        self.orders.append(order)
        seconds: dict[str, dict[str, list[float]]] = {BASELINE: {}, CANDIDATE: {}}
        for arm in order:
            for kernel, loss in (("first", 0.0), ("second", self.loss if arm == CANDIDATE else 0.0)):
                for mode in self.modes:
                    slow = (1 + loss) if mode == self.modes[-1] else 10.0
                    found = 1e-4 * slow * float(np.exp(rng.normal(0, self.noise)))
                    seconds[arm].setdefault(f"{kernel}, {mode}", []).append(found)
        return Taken({arm: self.facts(arm) for arm in (BASELINE, CANDIDATE)}, seconds)


def session(tmp_path: Path, turns: MadeUp) -> KernelSession:
    arms = Arm(BASELINE), Arm(CANDIDATE, ("--backend", "sdpa"))
    return KernelSession(POLICY, *arms, tmp_path / "gate", tell=lambda text: None, take_turns=turns)


def test_arms_take_turns_abba_and_the_other_way_round_in_the_next_pair(tmp_path: Path) -> None:
    turns = MadeUp()
    outcome = session(tmp_path, turns).run()
    assert outcome.exit_code == 0 and len(turns.orders) == 8
    assert [arm[0] for arm in turns.orders[0]] == list("bccb" * 4)
    assert [arm[0] for arm in turns.orders[1]] == list("cbbc" * 4)
    assert {each.metric for each in outcome.findings} == {"first", "second"}
    assert {each.margin for each in outcome.findings} == {0.05}


def test_a_slow_kernel_is_named(tmp_path: Path) -> None:
    outcome = session(tmp_path, MadeUp(loss=0.15)).run()
    assert outcome.exit_code == 1
    assert {each.metric: each.verdict for each in outcome.findings} == {
        "first": Verdict.PASS,
        "second": Verdict.REGRESSED,
    }
    assert "second 1.1" in outcome.reason and "first" not in outcome.reason


def test_a_captured_kernel_is_judged_by_its_graph(tmp_path: Path) -> None:
    outcome = session(tmp_path, MadeUp(loss=0.15, modes=("eager", "graph"))).run()
    assert {each.metric for each in outcome.findings} == {"first", "second"}
    assert outcome.pairs[0].values["first"][0] == pytest.approx(1e-4, rel=0.05)


def test_a_stopped_gate_goes_on_with_its_pairs(tmp_path: Path) -> None:
    whole = session(tmp_path, MadeUp(loss=0.15)).run()
    (tmp_path / "gate" / "pairs" / "07.json").unlink()
    again = MadeUp(loss=0.15)
    resumed = session(tmp_path, again).run()
    assert len(again.orders) == 1 and resumed.pairs[:7] == whole.pairs[:7]
    (tmp_path / "gate" / "pairs" / "03.json").write_text("{")
    with pytest.raises(HarnessError, match=r"03\.json is no pair of kernels"):
        session(tmp_path, MadeUp()).run()


def with_fact(arm: str, **changes: Any) -> Callable[[str], dict[str, Any]]:
    return lambda name: deepcopy(FACTS) | (changes if name == arm else {})


def test_wrong_refused_and_other_kernels(tmp_path: Path) -> None:
    wrong = session(tmp_path / "a", MadeUp(facts=with_fact(CANDIDATE, wrong=["first: off by 1"]))).run()
    assert (wrong.exit_code, len(wrong.pairs)) == (5, 1) and "first: off by 1" in wrong.reason
    own = session(tmp_path / "b", MadeUp(facts=with_fact(BASELINE, wrong=["first: off by 1"]))).run()
    assert own.exit_code == 4 and "baseline: wrong results" in own.reason
    refused = session(tmp_path / "c", MadeUp(facts=with_fact(CANDIDATE, refused={"first": "too wide"}))).run()
    assert refused.exit_code == 4 and "candidate refuses first: too wide" in refused.reason
    other = session(tmp_path / "d", MadeUp(facts=with_fact(CANDIDATE, dtype="torch.bfloat16"))).run()
    assert other.exit_code == 4 and "dtype differs" in other.reason


def test_kernels_are_calibrated(tmp_path: Path) -> None:
    found = calibrate(session(tmp_path, MadeUp(noise=0.2)), pairs=6)
    assert found.cell == "kernels" and found.metrics.keys() == {"first", "second"}
    assert "first margin 5.0%, could see >=" in (found.blind(POLICY) or "")
    assert found.blind(Policy(kernels=(), margins={KERNEL_TIME: 0.9})) is None


SLOW = """
import time
from backbench.backends.interface import Backend
from backbench.backends.sdpa.attention import SdpaAttention, SdpaRunner

class Slow(SdpaRunner):
    def run(self, q, cache, batch, out):
        started = time.perf_counter()
        super().run(q, cache, batch, out)
        while time.perf_counter() < started + {least}:
            pass

class SlowAttention(SdpaAttention):
    def open(self, spec, device):
        return Slow(spec, device)

BACKEND = Backend("slow", "", SlowAttention())
"""


def test_a_planted_slow_kernel_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real gate in one process: scaled dot products against the same, held up by 0.2 ms a call."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slow.py").write_text(SLOW.format(least=0.0002))
    (tmp_path / "bench-gate.toml").write_text('kernels = ["--shapes", "1q1s64", "--model", "tiny"]\n')
    arms = ["--baseline", "--backend sdpa", "--candidate", f"--backend {tmp_path / 'slow.py'}"]
    assert run_command(["gate", *arms, "--out", "slower"]) == 1
    found = json.loads((tmp_path / "slower" / "gate.json").read_text())
    (finding,) = found["findings"]
    assert finding["metric"].startswith("attention 1q1s64") and finding["verdict"] == "regressed"
    assert found["fingerprint"]["hard"]["dtype"] == "torch.float32"


@pytest.mark.slow
def test_arms_of_two_trees_have_a_process_each_and_new_ones_every_pair(tmp_path: Path) -> None:
    other = tmp_path / "tree"
    other.mkdir()
    for room in ("backbench", "backends", "engine", "harness", "reports", "workloads"):
        (other / room).symlink_to(HERE / room)
    options = {
        "backend_names": "torch",
        "shapes": "1q1s16",
        "kinds": "attention",
        "model": "tiny",
        "tokens": "1",
        "dtype": None,
        "block_size": None,
        "prefer": "cpu",
    }
    arms = Arm(BASELINE), Arm(CANDIDATE, tree=other)
    with InProcesses(arms, dict.fromkeys((BASELINE, CANDIDATE), options)) as turns:
        taken = turns((BASELINE, CANDIDATE))
        first = {worker._process.pid for worker in turns._workers}
        turns((BASELINE, CANDIDATE))
        assert len(first) == 2 and first.isdisjoint(worker._process.pid for worker in turns._workers)
    assert {len(rounds) for arm in taken.seconds.values() for rounds in arm.values()} == {1}
    assert not turns._workers
    with (
        InProcesses(
            (arms[0], Arm(CANDIDATE)), {BASELINE: options, CANDIDATE: options | {"shapes": "x"}}
        ) as one,
        pytest.raises(HarnessError, match="Attention shape 'x'"),
    ):
        one((BASELINE, CANDIDATE))


def test_an_arm_without_kernels_that_take_turns_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "backbench").mkdir()
    (tmp_path / "backbench" / "__init__.py").write_text("")
    with (
        InProcesses((Arm(BASELINE, tree=tmp_path), Arm(CANDIDATE)), {BASELINE: {}, CANDIDATE: {}}) as turns,
        pytest.raises(HarnessError, match=r"The baseline's kernels could not run: ModuleNotFoundError"),
    ):
        turns((BASELINE, CANDIDATE))


@pytest.mark.parametrize(
    ("arm", "words"),
    [("--backend torch,sdpa", "run on one backend"), ("--colour red", "--colour"), ("--rate 3", "--rate")],
)
def test_options_of_kernels_are_checked_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arm: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bench-gate.toml").write_text("kernels = []\n")
    assert run_command(["gate", "--baseline", "", "--candidate", arm]) == 2
    said = capsys.readouterr().err
    assert words in said and len(said.splitlines()) == 1 and not (tmp_path / "gate").exists()
