"""Floors: the worst value that any candidate may have, whatever its baseline does and the pairs can tell."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from backbench.harness.gate.outcome import Pair
from backbench.harness.gate.policy import Policy, gated
from backbench.reports.quantities import format_value

FLOOR_PAIRS = 3
"""Valid pairs after which floors count: the median of three is not one bad run's."""


def broken_floors(policy: Policy, valid: Sequence[Pair]) -> list[str]:
    """The floors that the candidate's median breaks, in words; nothing before `FLOOR_PAIRS` valid pairs.

    A rate that fell to nothing breaks a floor that needs no policy: it has no ratio to judge.
    """
    if len(valid) < FLOOR_PAIRS:
        return []
    broken = []
    for name in {**policy.margins, **policy.floors}:
        pairs = [pair.values[name] for pair in valid if name in pair.values]
        if len(pairs) < FLOOR_PAIRS:
            continue
        before, after = (float(np.median(side)) for side in zip(*pairs, strict=True))
        wanted = gated(name).quantity
        floor = policy.floors.get(name)
        if wanted.higher_is_better:
            bad = after < floor if floor is not None else after == 0 < before
            limit = f"its floor of {format_value(floor or 0.0, wanted.unit)}"
        else:
            bad = floor is not None and after > floor
            limit = f"the {format_value(floor, wanted.unit)} that it may be at most"
        if bad:
            told = f"{format_value(after, wanted.unit)}, {'at' if floor is None else 'worse than'} {limit}"
            side = f"median of {len(pairs)} runs; the baseline's {format_value(before, wanted.unit)}"
            broken.append(f"{name} is {told} ({side})")
    return broken
