"""Limits on ratios, as a script states them: "tpot_p50>1.05" fails where TPOT got over 5 % worse."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from backbench.errors import INVALID, ReportError, shown
from backbench.reports.arms import Arm, against
from backbench.reports.conclusion import why_unclear
from backbench.reports.metrics.metric import Quantity
from backbench.reports.quantities import QUANTITIES, format_ratio

OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_FORM = re.compile(r"\s*([\w.]+)\s*(>=|<=|>|<)\s*([\d.eE+-]+)\s*")


@dataclass(frozen=True)
class Limit:
    """A ratio to the baseline that must not be."""

    wanted: Quantity
    sign: str
    bound: float


def parse_limit(text: str) -> Limit:
    """ "tpot_p50>1.05"; raises ReportError, with the nearest name, where it is malformed."""
    found = _FORM.fullmatch(text)
    try:
        bound = float(found.group(3)) if found else math.nan
    except ValueError:
        bound = math.nan
    if found is None or not math.isfinite(bound):
        raise ReportError(f'--fail-if takes QUANTITY>RATIO, such as "tpot_p50>1.05"; not {shown(text)}.')
    names = {name: each for each in QUANTITIES for name in (*names_of(each),)}
    if found.group(1) not in names:
        import difflib

        near = difflib.get_close_matches(found.group(1), names, n=1, cutoff=0)[0]
        raise ReportError(f"--fail-if knows no quantity {shown(found.group(1))}; did you mean {near}?")
    return Limit(names[found.group(1)], found.group(2), bound)


def names_of(each: Quantity) -> tuple[str, str]:
    """A quantity's dotted path, and the same short: metrics.tpot_s.p50 is tpot_p50."""
    parts = [part.removesuffix("_s") if not part.endswith("_per_s") else part for part in each.path[1:]]
    return ".".join(each.path), "_".join(parts)


def broken(arms: Sequence[Arm], limit: Limit) -> Iterator[str]:
    """A line for every arm whose ratio to the first is over the limit and is no accident of the runs.

    Raises:
        ReportError: the runs allow no verdict, or lack the quantity (exit code 4).
    """
    for arm in arms[1:]:
        ratio = against(arms[0], arm, limit.wanted)
        what = f"{limit.wanted.label} of {arm.label} against {arms[0].label}"
        if ratio.value is None:
            raise ReportError(f"{what}: there is no ratio to judge.", exit_code=INVALID)
        if ratio.low is None or ratio.high is None or ratio.verdict == "unclear":
            alone = len(arm.runs) == len(arms[0].runs) == 1
            why = "one run each." if alone else why_unclear([arms[0], arm])
            raise ReportError(
                f"{what}: no verdict: {why} Repeat both in turns: bench run -b A,B --repeat 8.",
                exit_code=INVALID,
            )
        apart = not ratio.low <= 1 <= ratio.high
        if apart and OPERATORS[limit.sign](ratio.value, limit.bound):
            yield f"{what} is {ratio.text} ({ratio.interval}), {limit.sign} {format_ratio(limit.bound)}"
