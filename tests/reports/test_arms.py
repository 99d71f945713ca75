"""The sample is the run: how often identical arms are called better or worse, and who is never judged."""

from __future__ import annotations

import cProfile
import pstats
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from backbench.errors import ReportError
from backbench.reports.arms import (
    Arm,
    Run,
    against,
    arm_differences,
    arms_incomparable,
    arms_of,
    measured,
)
from backbench.reports.conclusion import conclusion, how_to_tell, left_out
from backbench.reports.limits import broken, parse_limit
from backbench.reports.metrics.between_runs import CHANCE
from backbench.reports.quantities import QUANTITIES, quantity
from backbench.reports.record import RunRecord
from backbench.reports.tables import scorecard_table

RATE = quantity("metrics", "output_tokens_per_s", "whole_run")
TPOT = quantity("metrics", "tpot_s", "p50")
TURNS = Path("an/experiment")
TRIALS = 1500
THREE_ERRORS = 3 * (0.05 * 0.95 / TRIALS) ** 0.5
"""Of a frequency of 5 % over the trials."""


def at_most(chance: float, trials: int = TRIALS) -> float:
    """The frequency that one of `chance` does not exceed by three standard errors."""
    return chance + 3 * (chance * (1 - chance) / trials) ** 0.5


def record(rate: float, seed: int = 0, device: str = "a", **asked: object) -> RunRecord:
    """A run with nothing but a rate, and the TPOT that follows; no interval within it could be narrower."""
    tpot = {"value": 1 / rate, "low": 1 / rate, "high": 1 / rate}
    return RunRecord(
        run={"status": "complete", "seed": seed, "asked": {"backend": "torch", "workload": "w"} | asked},
        workload={"name": "w", "content_hash": f"draw {seed}"},
        model={"name": "tiny"},
        system={"device": {"name": device}},
        backend={"asked": asked.get("backend", "torch")},
        metrics={"output_tokens_per_s": {"whole_run": rate, "steady_state": None}, "tpot_s": {"p50": tpot}},
    )


def arm(label: str, rates: list[float], experiment: Path | None = TURNS, **about: object) -> Arm:
    runs = tuple(Run(record(rate, block, **about), block) for block, rate in enumerate(rates))  # type: ignore[arg-type]
    return Arm(label, runs, experiment)


def in_turns(rng: np.random.Generator, blocks: int, loss: float = 0.0) -> tuple[Arm, Arm]:
    """Two arms on a machine with 1 % of noise and a drift of 3 % over the session, in the order A B B A."""
    drift = np.linspace(0, 0.03, 2 * blocks)
    noise = rng.normal(0, 0.01, 2 * blocks) + drift
    first, second = [], []
    for block in range(blocks):
        pair = noise[2 * block : 2 * block + 2]
        one, other = pair if block % 2 == 0 else pair[::-1]
        first.append(100 * np.exp(one))
        second.append(100 * (1 - loss) * np.exp(other))
    return arm("a", first), arm("b", second)


@pytest.mark.parametrize("blocks", [2, 4, 8])
def test_identical_arms_are_called_better_or_worse_at_most_as_often_as_said(blocks: int) -> None:
    rng = np.random.default_rng(blocks)
    pairs = [in_turns(rng, blocks) for _ in range(TRIALS)]
    called = np.mean([against(*pair, RATE).verdict in ("better", "worse") for pair in pairs])
    assert called <= at_most(CHANCE)
    named = np.mean(["fastest" in conclusion(pair) for pair in pairs[:300]])
    assert named <= at_most(CHANCE, 300)


def several_in_turns(rng: np.random.Generator, arms: int, blocks: int) -> list[Arm]:
    """`in_turns` for any number of identical arms."""
    noise = rng.normal(0, 0.01, (blocks, arms)) + np.linspace(0, 0.03, blocks * arms).reshape(blocks, arms)
    noise[1::2] = noise[1::2, ::-1]
    return [arm(f"arm {each}", list(100 * np.exp(noise[:, each]))) for each in range(arms)]


@pytest.mark.parametrize("arms", [3, 5])
def test_no_arm_of_several_identical_ones_is_called_fastest_more_often_than_said(arms: int) -> None:
    """The best of five is chosen after its values are seen, but has to beat every other one."""
    rng = np.random.default_rng(arms)
    named = np.mean(["fastest" in conclusion(several_in_turns(rng, arms, 8)) for _ in range(600)])
    assert named <= at_most(CHANCE, 600)


def test_leaving_runs_out_does_not_make_verdicts() -> None:
    """Whichever pairs a busy machine takes, the others are still a fair sample."""
    rng = np.random.default_rng(7)
    called = 0
    for _ in range(TRIALS):
        a, b = in_turns(rng, 8)
        called += against(doubtful(a, *np.flatnonzero(rng.random(8) < 0.2)), b, RATE).verdict in (
            "better",
            "worse",
        )
    assert called / TRIALS <= at_most(CHANCE)


@pytest.mark.parametrize("blocks", [4, 8, 16, 24])
def test_intervals_of_ratios_hold_the_truth_as_often_as_they_say(blocks: int) -> None:
    """Of a loss of 5 % without drift; the sign flip's may cover more than nominal, never less."""
    rng, truth, held = np.random.default_rng(blocks), 0.95, 0
    for _ in range(TRIALS):
        noise = rng.normal(0, 0.01, (2, blocks))
        a, b = arm("a", list(100 * np.exp(noise[0]))), arm("b", list(100 * truth * np.exp(noise[1])))
        found = against(a, b, RATE)
        assert found.low is not None and found.high is not None
        held += found.low <= truth <= found.high
    assert 0.95 - THREE_ERRORS <= held / TRIALS <= 0.975 + THREE_ERRORS


def test_machines_are_called_different_as_often_as_said() -> None:
    """Welch's verdict on two machines that are alike, one of them noisier, with other numbers of runs."""
    rng = np.random.default_rng(3)
    called = 0
    for _ in range(TRIALS):
        a = arm("a", list(100 * np.exp(rng.normal(0, 0.01, 5))), Path("x"))
        b = arm("b", list(100 * np.exp(rng.normal(0, 0.03, 8))), Path("y"), device="b")
        called += against(a, b, RATE).verdict in ("better", "worse")
    assert called / TRIALS <= at_most(CHANCE)


def test_a_real_loss_is_seen() -> None:
    rng = np.random.default_rng(0)
    verdicts = [against(*in_turns(rng, 8, loss=0.05), RATE).verdict for _ in range(300)]
    assert verdicts.count("worse") / 300 > 0.97
    assert "better" not in verdicts


def test_two_single_runs_never_get_a_verdict() -> None:
    """Whatever their intervals within the runs, which here have no width at all."""
    for ratio in (0.1, 0.9, 1.0, 1.1, 10.0):
        a, b = arm("a", [100.0], None), arm("b", [100.0 * ratio], None)
        for each in QUANTITIES:
            found = against(a, b, each)
            assert found.verdict in ("unclear", "") and found.low is None
        assert conclusion([a, b]) == "One run each: no verdict."


def test_one_block_is_no_verdict_either() -> None:
    assert against(arm("a", [100.0]), arm("b", [50.0]), RATE).verdict == "unclear"


def test_a_pair_is_of_one_block() -> None:
    """Blocks differ by half, arms by 2 %: pairs see the 2 %."""
    levels = [100.0, 150.0, 200.0, 120.0]
    found = against(arm("a", levels), arm("b", [1.02 * level for level in levels]), RATE)
    assert found.value == pytest.approx(1.02) and found.verdict == "better" and found.n == 4
    lacking = Arm("b", arm("b", [1.02 * level for level in levels]).runs[1:], TURNS)
    assert against(arm("a", levels), lacking, RATE).n == 3


def test_more_pairs_than_the_exact_test_takes() -> None:
    found = against(*in_turns(np.random.default_rng(1), 30, loss=0.05), RATE)
    assert found.verdict == "worse" and found.n == 30


def test_sessions_of_one_machine_get_an_interval_and_no_verdict() -> None:
    a, b = arm("a", [100.0, 101.0, 99.0], Path("x")), arm("b", [120.0, 121.0, 119.0], Path("y"))
    found = against(a, b, RATE)
    assert found.low is not None and found.low > 1 and found.verdict == "unclear"
    assert "did not take turns" in conclusion([a, b])


def test_machines_cannot_take_turns_and_get_welchs_interval() -> None:
    a = arm("a", [100.0, 101.0, 99.0], Path("x"))
    b = arm("b", [120.0, 125.0, 115.0, 118.0], Path("y"), device="b")
    found = against(a, b, RATE)
    stats = pytest.importorskip("scipy.stats")
    logs = [np.log(list(each.values(RATE).values())) for each in (b, a)]
    low, high = np.exp(stats.ttest_ind(*logs, equal_var=False).confidence_interval())
    assert (found.low, found.high) == pytest.approx((low, high)) and found.verdict == "better"


def test_the_value_of_several_runs_is_their_median_with_an_interval_between_them() -> None:
    reading = measured(arm("a", [100.0, 110.0, 90.0]), RATE)
    assert reading.value == 100
    assert reading.low is not None and reading.high is not None and reading.low < 90 < 110 < reading.high
    assert measured(arm("a", [100.0, 100.0]), RATE).low is None, "a constant has no spread to speak of"


def test_the_winner_is_named_first() -> None:
    rates = [100.0, 102.0, 99.0, 101.0, 100.5, 99.5, 100.2, 99.8]
    arms = [arm("torch", rates), arm("sdpa", [1.83 * rate * (1 + 0.001 * i) for i, rate in enumerate(rates)])]
    said = conclusion(arms)
    assert said.startswith("sdpa is fastest by Output tok/s, whole run: 1.84× (1.83–1.84) torch")
    assert said.endswith("n = 8 pairs.") and how_to_tell(arms) is None
    assert conclusion(arms[::-1]) == said


def doubtful(arm: Arm, *blocks: int, why: str = "throttled") -> Arm:
    """The arm with the runs of these blocks not valid."""
    runs = [
        replace(run, record=replace(run.record, validity=[why] if run.block in blocks else []))
        for run in arm.runs
    ]
    return replace(arm, runs=tuple(runs))


def test_a_run_that_is_not_valid_is_left_out_with_its_pair() -> None:
    """Its rate, a hundred times the others', is in no ratio, no median and no interval."""
    rates = [100.0, 102.0, 99.0, 101.0, 100.5, 99.5, 100.2, 99.8]
    wild = [*rates[:2], 10_000.0, *rates[3:]]
    fast = arm("b", [1.2 * rate for rate in rates])
    slow, rest = doubtful(arm("a", wild), 2), arm("a", rates[:2] + rates[3:])
    assert measured(slow, RATE) == measured(rest, RATE)
    found = against(slow, fast, RATE)
    assert found.value == pytest.approx(1.2) and found.n == 7 and found.verdict == "better"
    assert left_out([slow, fast]) == ["pair 3 left out: a: throttled"]
    assert conclusion([slow, fast]).endswith("n = 7 pairs. Left out as not valid: 1 of 16 runs.")
    assert slow.representative.record.metrics["output_tokens_per_s"]["whole_run"] < 200


def test_too_few_valid_pairs_are_no_verdict() -> None:
    rates = [100.0, 101.0, 99.0]
    a, b = doubtful(arm("a", rates), 0), doubtful(arm("b", [2 * rate for rate in rates]), 1)
    assert against(a, b, RATE).verdict == "unclear"
    assert conclusion([a, b]).startswith("No verdict: fewer than two pairs of valid runs are left.")
    none = doubtful(arm("b", [2 * rate for rate in rates]), 0, 1, 2)
    assert against(a, none, RATE).verdict == "unclear" and measured(none, RATE).value == 200
    assert "of the 3 runs of b, 0 are valid" in conclusion([arm("a", rates), none])
    with pytest.raises(ReportError, match="of the 3 runs of b, 0 are valid"):
        list(broken([arm("a", rates), none], parse_limit("tpot_p50>1.05")))


def test_comparing_more_arms_costs_in_proportion() -> None:
    """Calls, not seconds; 40 arms and 160 of single runs, as 1,000 stored runs are compared."""

    def calls(number: int) -> int:
        arms = arms_of([record(100.0 + each, max_seqs=each) for each in range(number)])
        profile = cProfile.Profile()
        with profile:
            arms_of([each.records[0] for each in arms])
            conclusion(arms), left_out(arms), arm_differences(arms), arms_incomparable(arms)
            scorecard_table(arms)
        return pstats.Stats(profile).total_calls  # type: ignore[attr-defined]

    assert calls(160) < 6 * calls(40)


def test_a_run_that_did_not_finish_counts_for_nothing() -> None:
    whole = arm("a", [100.0, 101.0])
    first, other = whole.runs
    cut = replace(first, record=replace(first.record, run=first.record.run | {"status": "interrupted"}))
    assert replace(whole, runs=(cut, other)).counted == (other,)
    assert cut.left_out == "it was interrupted"


def test_a_single_run_says_every_reason() -> None:
    first = arm("a", [1.0], None)
    found = replace(
        first, runs=(replace(first.runs[0], record=replace(first.records[0], validity=["x", "y"])),)
    )
    assert left_out([found, arm("b", [1.0], None)]) == ["a is not valid: x", "a is not valid: y"]


@pytest.mark.parametrize(
    ("asked", "command"),
    [
        ({"backend": "sdpa"}, "bench run --workload w --backend torch,sdpa --repeat 8"),
        (
            {"max_seqs": 64},
            "bench gate --baseline '--workload w --backend torch' "
            "--candidate '--workload w --backend torch --max-seqs 64'",
        ),
        ({}, "bench run --workload w --backend torch --repeat 8"),
    ],
)
def test_the_command_that_would_tell(asked: dict[str, object], command: str) -> None:
    assert how_to_tell([arm("a", [1.0], None), arm("b", [2.0], None, **asked)]) == command


def test_arms_compare_by_the_draws_they_share() -> None:
    assert arms_incomparable([arm("a", [1.0, 1.0]), arm("b", [1.0])]) == []
    other = Arm("b", (Run(record(1.0, seed=7)),))
    assert [each.field for each in arms_incomparable([arm("a", [1.0]), other])] == ["workload"]


def test_a_limit_breaks_only_beyond_the_spread() -> None:
    rates = [100.0, 101.0, 99.0, 100.0, 100.5, 99.5, 100.2, 99.8]
    slow = arm("b", [0.9 * rate for rate in rates])
    (line,) = broken([arm("a", rates), slow], parse_limit("tpot_p50>1.05"))
    assert "1.11×" in line and "> 1.05×" in line
    assert not list(broken([arm("a", rates), slow], parse_limit("metrics.tpot_s.p50 > 1.2")))
    noisy = arm("b", [50.0, 150.0, 60.0, 140.0, 55.0, 145.0, 70.0, 90.0])
    assert not list(broken([arm("a", rates), noisy], parse_limit("tpot_p50>1.05")))
    with pytest.raises(ReportError, match="no verdict: one run each") as error:
        list(broken([arm("a", [1.0], None), arm("b", [9.0], None)], parse_limit("tpot_p50>1.05")))
    assert error.value.exit_code == 4


@pytest.mark.parametrize("text", ["", "tpot_p50", "tpot_p50>", "tpot_p50>x", "tpot_p50=1", "tpott>1", ">1"])
def test_a_malformed_limit_is_one_line(text: str) -> None:
    with pytest.raises(ReportError, match="--fail-if") as error:
        parse_limit(text)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200
