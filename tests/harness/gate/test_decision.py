"""The gate's errors, over thousands of simulated gates with the noise of a serving machine.

Noise of a run (relative): 1 % of its own, a drift of 1.2 % over the gate, 3 % a session that both arms
share, and in one run of twenty something else on the machine, a slowdown of 3 % on average.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from backbench.harness.gate.arms import BASELINE, CANDIDATE, Arm, run_in_process
from backbench.harness.gate.decision import LOOKS, Verdict, judge
from backbench.harness.gate.outcome import Pair
from backbench.harness.gate.policy import METRICS, Policy
from backbench.harness.gate.session import Session

MARGIN = 0.03


def pairs(
    rng: np.random.Generator, loss: float, own: float = 0.01, drift: float = 0.012, outlier: float = 0.03
) -> np.ndarray:
    """Sixteen differences in the order A B B A."""
    runs = 2 * LOOKS[-1]
    noise = rng.normal(0, own, runs) + np.cumsum(rng.normal(0, drift / runs**0.5, runs))
    noise += np.linspace(0, rng.normal(0, drift), runs)
    noise += (rng.random(runs) < 0.05) * rng.exponential(outlier, runs)
    first, second = noise[::2], noise[1::2]
    forward = np.arange(LOOKS[-1]) % 2 == 0
    return np.where(forward, second - first, first - second) + np.log1p(loss)


class Simulated(Session):
    """A whole gate whose pairs are drawn, not run."""

    def __init__(self, seen: Mapping[str, np.ndarray]) -> None:
        policy = Policy(margins=dict.fromkeys(seen, MARGIN))
        super().__init__(policy, Arm(BASELINE), Arm(CANDIDATE), Path("unused"), run_in_process)
        self.seen = seen

    def claim(self) -> None:
        """It has no directory."""

    def next_pair(self, pairs: Sequence[Pair]) -> Pair:
        index = len(pairs)
        values = {}
        for name, each in self.seen.items():
            worse = float(np.exp(each[index]))
            values[name] = (1.0, 1 / worse if METRICS[name].quantity.higher_is_better else worse)
        return Pair(index, index, (BASELINE, CANDIDATE), values)


def verdicts(trials: int, loss: float, **noise: float) -> Counter[Verdict]:
    """A loss in throughput shows in TPOT too; TTFT keeps its own noise."""
    rng = np.random.default_rng(round(loss * 1000) + trials)
    found: Counter[Verdict] = Counter()
    for _ in range(trials):
        speed = pairs(rng, loss, **noise)
        seen = {
            "throughput": speed,
            "tpot_p50": speed + rng.normal(0, 0.003, len(speed)),
            "ttft_p50": pairs(rng, 0, **noise),
        }
        found[Simulated(seen).run().verdict] += 1
    return found


def test_good_code_does_not_fail() -> None:
    found = verdicts(2000, 0.0)
    assert found[Verdict.REGRESSED] <= 0.01 * 2000
    assert found[Verdict.PASS] >= 0.8 * 2000


def test_good_code_does_not_fail_whichever_of_six_metrics_is_unlucky() -> None:
    rng = np.random.default_rng(6)
    names = ("throughput", "tpot_p50", "ttft_p50", "joules_per_token", "prefill", "goodput")
    found = Counter(Simulated({name: pairs(rng, 0) for name in names}).run().verdict for _ in range(1000))
    assert found[Verdict.REGRESSED] <= 0.01 * 1000


def test_a_loss_of_five_percent_in_one_of_six_metrics_is_found() -> None:
    """Holm's strictest level; the others are as they were."""
    rng = np.random.default_rng(7)
    names = ("throughput", "tpot_p50", "ttft_p50", "joules_per_token", "prefill")
    found = Counter(
        Simulated({name: pairs(rng, 0) for name in names} | {"goodput": pairs(rng, 0.05)}).run().verdict
        for _ in range(1000)
    )
    assert found[Verdict.REGRESSED] >= 0.97 * 1000


def test_a_loss_of_five_percent_is_found() -> None:
    assert verdicts(2000, 0.05)[Verdict.REGRESSED] >= 0.97 * 2000


@pytest.mark.parametrize("own", [0.05, 0.15])
def test_a_noisy_machine_does_not_pass_a_loss_of_ten_percent(own: float) -> None:
    assert verdicts(1000, 0.10, own=own, drift=0.05)[Verdict.PASS] <= 0.02 * 1000


def test_a_noisy_machine_says_that_it_cannot_tell() -> None:
    found = verdicts(1000, 0.0, own=0.05, drift=0.05)
    assert found[Verdict.REGRESSED] <= 0.05 * 1000
    assert found[Verdict.INCONCLUSIVE] >= 0.75 * 1000  # the rest passes, and is right to


def test_a_finding_says_what_could_have_been_seen() -> None:
    rng = np.random.default_rng(7)
    seen = [
        judge({"throughput": rng.normal(0, 0.02, 16)}, {"throughput": MARGIN})[0].detectable
        for _ in range(200)
    ]
    # (t_0.978 + t_0.9) x 0.02 / 4 with 15 degrees of freedom: 1.79 %.
    assert np.mean(seen) == pytest.approx(0.0179, rel=0.05)
