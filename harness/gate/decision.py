"""What a gate concludes from its pairs so far: regressed, pass, inconclusive, or that it needs more pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import exp, log

import numpy as np
from scipy.special import stdtrit

from backbench.reports.metrics.between_runs import hodges_lehmann, holm, sign_flip
from backbench.reports.metrics.statistics import Floats

LOOKS = (8, 12, 16)
"""Valid pairs after which the gate looks; the last look decides."""
FAMILY_ERROR = 0.022
"""Chance a look that finds a difference anywhere where there is none, over all gated metrics together: over
three looks that makes 5 % (Pocock 1977)."""
POWER = 0.9
"""The detectable effect is one that a look finds this often."""


class Verdict(StrEnum):
    """What the pairs say of one metric, or of all."""

    REGRESSED = "regressed"
    PASS = "pass"
    EXTEND = "extend"
    INCONCLUSIVE = "inconclusive"
    INVALID = "invalid"
    """Of a whole gate: its pairs cannot be judged."""


@dataclass(frozen=True)
class Finding:
    """One metric after some pairs. Losses are relative: 0.05 = 5 % worse; negative = better."""

    metric: str
    pairs: int
    loss: float
    low: float
    high: float
    """Of the loss, at 95 %."""
    p: float
    """One-sided, of "worse", adjusted for all gated metrics."""
    margin: float
    detectable: float
    """The smallest true loss that this many pairs with this noise would find nine times of ten."""
    verdict: Verdict


def judge(differences: Mapping[str, Floats], margins: Mapping[str, float]) -> list[Finding]:
    """What the pairs so far say.

    Args:
        differences: metric -> ln(candidate / baseline) a pair, oriented so that + is worse; at least 6 pairs.
        margins: metric -> the relative loss that is too much. Noise never widens it.
    """
    tests = [sign_flip(each) for each in differences.values()]
    p_values = holm(np.array([p for p, _ in tests]))
    findings = []
    for (metric, pairs), (_, interval), p in zip(differences.items(), tests, p_values, strict=True):
        assert interval is not None
        noise = float(pairs.std(ddof=1))
        least = detectable_effect(noise, len(pairs), len(differences))
        findings.append(_finding(metric, pairs, interval, float(p), margins[metric], least))
    return findings


def _finding(
    metric: str, pairs: Floats, interval: tuple[float, float], p: float, margin: float, detectable: float
) -> Finding:
    centre, limit = hodges_lehmann(pairs), log(1 + margin)
    verdict = Verdict.EXTEND if len(pairs) < LOOKS[-1] else Verdict.INCONCLUSIVE
    if p <= FAMILY_ERROR and centre >= limit:
        verdict = Verdict.REGRESSED
    elif interval[1] < limit:
        verdict = Verdict.PASS
    loss, low, high = (exp(each) - 1 for each in (centre, *interval))
    return Finding(metric, len(pairs), loss, low, high, p, margin, detectable, verdict)


def detectable_effect(noise: float, pairs: int, family: int = 1) -> float:
    """The relative loss that so many pairs would find with chance `POWER`.

    From Student's test at the family's strictest level: (t_{1 - alpha/m} + t_{power}) standard errors.

    Args:
        noise: standard deviation of the pairs' differences.
        family: metrics that are gated together.
    """
    reach = stdtrit(pairs - 1, 1 - FAMILY_ERROR / family) + stdtrit(pairs - 1, POWER)
    return exp(float(reach) * noise / pairs**0.5) - 1


def overall(findings: list[Finding]) -> Verdict:
    """The gate's answer: the worst of its metrics."""
    order = (Verdict.REGRESSED, Verdict.EXTEND, Verdict.INCONCLUSIVE, Verdict.PASS)
    return min((each.verdict for each in findings), key=order.index)
