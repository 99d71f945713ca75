"""The ratios of two arms in all quantities, judged together.

A table of thirty quantities has thirty chances to show a difference where there is none, and quantities of
one run err together. So what is called better or worse in a table holds for the whole table: of two equal
arms, one ratio or more is called in at most one table of a hundred. The quantity that decides who is fastest
was chosen before a value was seen, and stands for itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from backbench.reports.arms import Arm, against, compared_in, is_paired, measured
from backbench.reports.compare import Ratio
from backbench.reports.conclusion import judged_quantity
from backbench.reports.metrics.between_runs import (
    CHANCE,
    FEWEST_PAIRS,
    MOST_PAIRS,
    holm,
    joint_sign_flip_p,
    student_p,
    welch_p,
)
from backbench.reports.metrics.metric import Quantity

if TYPE_CHECKING:
    import pandas as pd

CALLED = ("better", "worse")


def ratios(reference: Arm, candidate: Arm, wanted: Sequence[Quantity]) -> dict[Quantity, Ratio]:
    """candidate / reference by quantity; "unclear" where only a quantity looked at alone would be called."""
    found = {each: against(reference, candidate, each) for each in wanted}
    called = {each for each, ratio in found.items() if ratio.verdict in CALLED}
    if not called:
        return found
    first = judged_quantity([reference, candidate])
    if called == {first}:
        return found
    together = [each for each, ratio in found.items() if ratio.verdict in (*CALLED, "same") and each != first]
    for each, p in zip(together, _p_values(reference, candidate, together), strict=True):
        if found[each].verdict in CALLED and p > CHANCE:
            found[each] = replace(found[each], verdict="unclear")
    return found


def _p_values(reference: Arm, candidate: Arm, wanted: Sequence[Quantity]) -> np.ndarray:
    """Adjusted for all of them, in order; the tests are those of `against`."""
    before = [reference.values(each) for each in wanted]
    after = [candidate.values(each) for each in wanted]
    if not is_paired(reference, candidate):
        return holm(
            np.array(
                [
                    welch_p(np.log(list(first.values())), np.log(list(second.values())))
                    for first, second in zip(before, after, strict=True)
                ]
            )
        )
    turns = sorted({turn for values in before for turn in values}, key=str)
    # A pair that lacks a quantity says nothing of it: 0 either way the signs are flipped.
    logs = np.array(
        [
            [
                np.log(second[turn] / first[turn]) if turn in first and turn in second else 0.0
                for turn in turns
            ]
            for first, second in zip(before, after, strict=True)
        ]
    ).T
    logs = logs[np.any(logs != 0, axis=1)]
    if FEWEST_PAIRS <= len(logs) <= MOST_PAIRS:
        return joint_sign_flip_p(logs)
    return holm(np.array([student_p(column) for column in logs.T]))


def ratio_table(arms: Sequence[Arm]) -> pd.DataFrame:
    """One row a quantity: unit, which way is better, every arm's value, and the ratios to the first.

    Columns: metric, unit, better ("higher" | "lower" | ""), each arm's label with its value (the median of
    several runs), and for each arm after the first "<label> / <first label>" with the ratio, and the same
    name with " low", " high" (the interval between runs) and " verdict".
    """
    import pandas as pd

    wanted = compared_in(arms)
    judged = {arm.label: ratios(arms[0], arm, wanted) for arm in arms[1:]}
    rows = []
    for each in wanted:
        better = {True: "higher", False: "lower", None: ""}[each.higher_is_better]
        row: dict[str, Any] = {"metric": each.label, "unit": each.unit, "better": better}
        row |= {arm.label: measured(arm, each).value for arm in arms}
        for arm in arms[1:]:
            name, found = f"{arm.label} / {arms[0].label}", judged[arm.label][each]
            row |= {name: found.value, f"{name} low": found.low, f"{name} high": found.high}
            row[f"{name} verdict"] = found.verdict
        rows.append(row)
    return pd.DataFrame(rows)
