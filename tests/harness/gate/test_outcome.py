"""The files a gate leaves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from gate.conftest import FakeRunner

from backbench.harness.gate.arms import Arm
from backbench.harness.gate.decision import Finding, Verdict
from backbench.harness.gate.outcome import headline, sentence, to_markdown, write
from backbench.harness.gate.policy import Policy
from backbench.harness.gate.session import Session

Gate = Callable[..., Session]
HOSTILE = "<script>alert(1)</script>\x1b[31m & \"' \ud800"


def answer(gate: Gate, runner: FakeRunner) -> tuple[dict[str, object], ElementTree.Element, str]:
    session = gate(runner)
    write(session.run(), session.out)
    content = json.loads((session.out / "gate.json").read_text())
    suite = ElementTree.fromstring((session.out / "junit.xml").read_text(encoding="utf-8"))
    summary = (session.out / "summary.md").read_text(encoding="utf-8")
    shutil.rmtree(session.out)
    return content, suite, summary


def test_gate_json_has_everything_that_the_verdict_rests_on(gate: Gate) -> None:
    content, _, _ = answer(gate, FakeRunner(loss=0.1))
    assert content["verdict"] == "regressed" and content["exit_code"] == 1 and content["schema_version"] == 1
    assert content["arms"] == {"baseline": {}, "candidate": {"options": "--backend sdpa"}}
    assert len(content["pairs"]) == 8
    pair = content["pairs"][1]
    assert pair["seed"] == 1 and pair["order"] == ["candidate", "baseline"] and pair["void"] == []
    assert pair["values"]["tpot_p50"] == pytest.approx([0.02, 0.022], rel=0.02)
    finding = content["findings"][0]
    assert {"p", "low", "high", "margin", "detectable", "loss", "pairs"} <= finding.keys()
    assert content["fingerprint"]["hard"]["model.name"] == "tiny"
    assert content["policy"]["margins"]["throughput"] == 0.03 and content["utc"]


@pytest.mark.parametrize(
    ("runner", "tags", "counts"),
    [
        (FakeRunner(), [None] * 3, ("3", "0", "0", "0")),
        (FakeRunner(loss=0.1), ["failure"] * 3, ("3", "3", "0", "0")),
        (FakeRunner(noise=0.2), ["skipped"] * 3, ("3", "0", "0", "3")),
        (FakeRunner(change=lambda r, a, s: replace(r, validity=["x"])), ["error"], ("1", "0", "1", "0")),
        (
            FakeRunner(change=lambda r, a, s: replace(r, correctness={"passed": False, "reason": HOSTILE})),
            ["error"],
            ("1", "0", "1", "0"),
        ),
    ],
)
def test_junit(gate: Gate, runner: FakeRunner, tags: list[str | None], counts: tuple[str, ...]) -> None:
    _, suite, _ = answer(gate, runner)
    assert [case[0].tag if len(case) else None for case in suite] == tags
    assert tuple(suite.attrib[name] for name in ("tests", "failures", "errors", "skipped")) == counts


def test_a_broken_floor_is_a_failure_of_its_own(gate: Gate) -> None:
    session = gate(FakeRunner(loss=1.0), policy=Policy(floors={"throughput": 490.0}))
    outcome = session.run()
    write(outcome, session.out)
    suite = ElementTree.fromstring((session.out / "junit.xml").read_text())
    assert [case.attrib["name"] for case in suite] == ["floor"] and suite[0][0].tag == "failure"
    assert "worse than its floor" in headline(outcome) and headline(outcome).startswith("REGRESSED")
    assert json.loads((session.out / "gate.json").read_text())["floors"] == list(outcome.floors)


def test_the_summary_is_short_and_says_what_could_be_seen(gate: Gate) -> None:
    def void(record, arm, seed):  # type: ignore[no-untyped-def]
        return replace(record, validity=["the GPU was throttled"]) if seed == 2 else record

    _, _, summary = answer(gate, FakeRunner(change=void))
    assert summary.startswith("**PASS: ") and "could have seen" in summary.splitlines()[0]
    assert "8 valid, 1 void" in summary and "pair 3 is void: baseline: the GPU was throttled" in summary
    assert "| tpot_p50 | pass |" in summary


def test_a_summary_of_the_worst_gate_stays_far_below_the_limit_of_a_step_summary(gate: Gate) -> None:
    long = FakeRunner(
        noise=0.2, change=lambda r, a, s: replace(r, validity=["x" * 10_000] * (s < 7 and s > 0))
    )
    _, _, summary = answer(gate, long)
    assert len(summary.encode()) < 2**20 / 4
    assert summary.count("is void: ") == 6 and summary.count("…") == 6


def test_what_is_shared_names_nobody(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/srv/people/ada")
    session = gate(FakeRunner(), policy=Policy(options=("--dataset", "/srv/people/ada/chats.json")))
    session.candidate = Arm("candidate", ("--model", "/srv/people/ada/models/m"))
    outcome = session.run()
    write(outcome, session.out)
    for name in ("plan.json", "gate.json", "junit.xml", "summary.md"):
        assert "ada" not in (session.out / name).read_text()


def test_an_inconclusive_answer_says_what_it_could_have_seen(gate: Gate) -> None:
    outcome = gate(FakeRunner(noise=0.2)).run()
    assert headline(outcome).startswith("INCONCLUSIVE: ") and "could have seen >=" in headline(outcome)
    assert to_markdown(outcome).count("inconclusive") >= 3


@pytest.mark.parametrize(
    ("metric", "loss", "said"),
    [
        ("throughput", -0.8, "throughput 5.000x the baseline's, better (4.000 to 10.000, n = 8 pairs"),
        ("throughput", 0.0, "throughput 1.000x the baseline's (0.769 to 1.111, n = 8 pairs"),
        ("tpot_p50", -0.8, "tpot_p50 0.200x the baseline's, better (0.100 to 0.250, n = 8 pairs"),
        ("throughput", 0.25, "throughput 0.800x the baseline's, worse (0.714 to 0.909, n = 8 pairs"),
    ],
)
def test_a_change_is_said_in_the_metrics_own_direction(metric: str, loss: float, said: str) -> None:
    """A loss is oriented so that + is worse; a rate that rose fivefold is not "80 % better".

    An interval that holds no change says neither.
    """
    low, high = {-0.8: (-0.9, -0.75), 0.0: (-0.1, 0.3), 0.25: (0.1, 0.4)}[loss]
    assert sentence(Finding(metric, 8, loss, low, high, 0.01, 0.03, 0.02, Verdict.PASS)).startswith(said)
