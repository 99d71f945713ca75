"""The ratios of a table, judged together: how often equal arms get any verdict, and what is still seen."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from backbench.reports.arms import Arm, Run, against
from backbench.reports.metrics.between_runs import (
    CHANCE,
    joint_sign_flip_p,
    sign_flip_p,
    student_p,
    welch_p,
)
from backbench.reports.quantities import QUANTITIES
from backbench.reports.ratios import CALLED, ratio_table, ratios
from backbench.reports.record import RunRecord

JUDGED = [each for each in QUANTITIES if each.higher_is_better is not None and each.path[0] == "metrics"][:20]
TRIALS = 400


def record(values: np.ndarray, seed: int, device: str) -> RunRecord:
    """A run with these values of `JUDGED`."""
    metrics: dict[str, object] = {}
    for each, value in zip(JUDGED, values, strict=True):
        place = metrics
        for key in each.path[1:-1]:
            place = place.setdefault(key, {})  # type: ignore[assignment]
        place[each.path[-1]] = float(value)
    return RunRecord(
        run={"status": "complete", "seed": seed, "asked": {"backend": "torch", "workload": "w"}},
        workload={"name": "w", "content_hash": f"draw {seed}"},
        model={"name": "tiny"},
        system={"device": {"name": device}},
        backend={"asked": "torch"},
        metrics=metrics,
    )


def arms(
    rng: np.random.Generator, n: int, paired: bool, change: dict[int, float] | None = None
) -> tuple[Arm, Arm]:
    """Two arms of n runs whose quantities err together, by groups of five; the second changed by factors."""
    found = []
    for place in range(2):
        noise = np.repeat(rng.normal(0, 0.02, (n, len(JUDGED) // 5)), 5, axis=1)
        values = 100 * np.exp(noise + rng.normal(0, 0.01, (n, len(JUDGED))))
        for index, factor in (change or {}).items() if place else ():
            values[:, index] *= factor
        device = "a" if paired or place == 0 else "b"
        runs = tuple(Run(record(row, block, device), block) for block, row in enumerate(values))
        found.append(Arm(f"arm {place}", runs, Path("one" if paired else f"of {place}")))
    return found[0], found[1]


@pytest.mark.parametrize(("n", "paired"), [(3, True), (6, True), (8, True), (20, True), (6, False)])
def test_equal_arms_get_a_verdict_in_at_most_one_table_of_a_hundred(n: int, paired: bool) -> None:
    """The first, which decides who is fastest, stands for itself; alone, the others would be called often."""
    rng = np.random.default_rng(n)
    tables, alone = 0, 0
    for _ in range(TRIALS):
        found = ratios(*arms(rng, n, paired), JUDGED[1:])
        tables += any(each.verdict in CALLED for each in found.values())
        alone += any(
            each.low is not None and each.high is not None and not each.low <= 1 <= each.high
            for each in found.values()
        )
    assert tables / TRIALS <= CHANCE + 3 * (CHANCE * (1 - CHANCE) / TRIALS) ** 0.5
    assert alone / TRIALS > 0.1, "the tables are no test if nothing would be called alone"


@pytest.mark.parametrize(("n", "factor"), [(4, 1.5), (6, 1.5), (8, 1.15)])
def test_what_differs_is_still_called(n: int, factor: float) -> None:
    """A pair's noise is 3.2 %. At 8 pairs, 10 % in one quantity of twenty are called in four of five."""
    rng = np.random.default_rng(n)
    changed = JUDGED[7]
    called = sum(
        ratios(*arms(rng, n, True, {7: factor}), JUDGED)[changed].verdict in CALLED for _ in range(100)
    )
    assert called >= 90


def test_a_table_says_what_is_judged_together() -> None:
    """Its intervals are those of each quantity alone."""
    rng = np.random.default_rng(5)
    judged = ((pair, ratios(*pair, JUDGED)) for pair in (arms(rng, 6, True) for _ in range(200)))
    pair, found = next(each for each in judged if "unclear" in {ratio.verdict for ratio in each[1].values()})
    unclear = next(each for each, ratio in found.items() if ratio.verdict == "unclear")
    table = ratio_table(pair).set_index("metric")
    assert table.loc[unclear.label, "arm 1 / arm 0 verdict"] == "unclear"
    single = against(*pair, unclear)
    assert single.verdict in CALLED and replace(single, verdict="unclear") == found[unclear]


@settings(max_examples=50)
@given(arrays(np.float64, st.tuples(st.integers(2, 6), st.integers(1, 4)), elements=st.floats(-1, 1)))
def test_joint_p_values_are_those_of_all_flips(pairs: np.ndarray) -> None:
    scale = np.sqrt((pairs**2).sum(axis=0))
    columns = [
        pairs[:, each] / scale[each] if scale[each] else pairs[:, each] for each in range(pairs.shape[1])
    ]
    unit = np.stack(columns, axis=1)
    largest = [np.abs(np.array(flip) @ unit).max() for flip in itertools.product((1, -1), repeat=len(pairs))]
    wanted = [np.mean(np.array(largest) >= abs(column.sum()) - 1e-9) for column in columns]
    assert joint_sign_flip_p(pairs) == pytest.approx(wanted)


def test_one_quantity_alone_has_its_own_p_value() -> None:
    pairs = np.random.default_rng(2).normal(0.3, 1, (8, 1))
    assert joint_sign_flip_p(pairs)[0] == pytest.approx(2 * sign_flip_p(pairs[:, 0]), abs=2**-8)


def test_student_and_welch_are_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(4)
    one, other = rng.normal(0, 1, 5), rng.normal(0.5, 3, 9)
    assert student_p(one) == pytest.approx(stats.ttest_1samp(one, 0).pvalue)
    assert welch_p(one, other) == pytest.approx(stats.ttest_ind(one, other, equal_var=False).pvalue)
    assert student_p(np.zeros(3)) == 1 and student_p(np.full(3, 2.0)) == 0
