"""Speculation: how many drafted tokens were accepted, and what drafting and verifying cost.

The record keeps counts (`outcomes`: how often so many tokens were drafted and so many accepted) and sums of
times; every number here follows from them. Lengths include the bonus: the token that the model itself gives
in every verified step, whatever was drafted. Steps' times are those of steps without prompt tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from backbench.reports.metrics.metric import Metric, Missing, Part
from backbench.reports.metrics.run import RunTables
from backbench.reports.metrics.statistics import Floats

OUTCOMES = ("drafted", "accepted", "drafts")
"""What is kept: parallel lists; so many drafts had so many tokens, and so many of those were accepted."""
TIMES = ("draft_s", "drafted_steps", "drafted_steps_s", "plain_steps", "plain_steps_s")
"""And sums: of drafting; steps that verified drafts and those that had none, with their times."""

Kept = Mapping[str, Any]


def kept(run: RunTables) -> Kept | Missing:
    """The counts and sums; Missing where the run did not speculate or was cut off."""
    section = run.given.get("speculation") or {}
    if isinstance(section.get("outcomes"), dict):
        return section
    return Missing(section.get("reason") or "the engine did not speculate")


def _outcomes(found: Kept) -> tuple[Floats, Floats, Floats]:
    drafted, accepted, count = (np.array(found["outcomes"][name], dtype=np.float64) for name in OUTCOMES)
    return drafted, accepted, count


def _drafts(found: Kept) -> int:
    return int(_outcomes(found)[2].sum())


def _drafted(found: Kept) -> int:
    drafted, _, count = _outcomes(found)
    return int((drafted * count).sum())


def _accepted(found: Kept) -> int:
    _, accepted, count = _outcomes(found)
    return int((accepted * count).sum())


def _mean_length(found: Kept) -> float | Missing:
    drafts = _drafts(found)
    return 1 + _accepted(found) / drafts if drafts else NO_DRAFTS


def _acceptance(found: Kept) -> float | Missing:
    drafted = _drafted(found)
    return _accepted(found) / drafted if drafted else NO_DRAFTS


def _by_place(
    found: Kept, reached: Callable[[Floats, Floats, int], Any]
) -> dict[str, float | None] | Missing:
    """A rate for each place in a draft, "1" the first: accepted there, over those that `reached` tells."""
    drafted, accepted, count = _outcomes(found)
    if not len(count):
        return NO_DRAFTS
    rates: dict[str, float | None] = {}
    for place in range(1, int(drafted.max()) + 1):
        among = float(count[reached(drafted, accepted, place)].sum())
        rates[str(place)] = float(count[accepted >= place].sum()) / among if among else None
    return rates


def _unconditional(found: Kept) -> Any:
    return _by_place(found, lambda drafted, accepted, place: drafted >= place)


def _conditional(found: Kept) -> Any:
    return _by_place(found, lambda drafted, accepted, place: (drafted >= place) & (accepted >= place - 1))


def _histogram(found: Kept) -> dict[str, int] | Missing:
    _, accepted, count = _outcomes(found)
    if not len(count):
        return NO_DRAFTS
    return {str(length): int(count[accepted == length].sum()) for length in range(int(accepted.max()) + 1)}


def _draft_share(found: Kept) -> float | Missing:
    busy = found["drafted_steps_s"]
    return found["draft_s"] / busy if busy else NO_DRAFTS


def _drafted_share(found: Kept) -> float | Missing:
    steps = found["drafted_steps"] + found["plain_steps"]
    return found["drafted_steps"] / steps if steps else Missing("no step only decoded")


def _mean_s(kind: str) -> Callable[[Kept], float | Missing]:
    def value(found: Kept) -> float | Missing:
        steps = found[f"{kind}_steps"]
        return found[f"{kind}_steps_s"] / steps if steps else Missing(f"no {kind} step only decoded")

    return value


def _break_even(found: Kept) -> float | Missing:
    drafted, plain = _mean_s("drafted")(found), _mean_s("plain")(found)
    if isinstance(drafted, Missing) or isinstance(plain, Missing):
        return Missing("needs steps with and without drafts")
    return drafted / plain


NO_DRAFTS = Missing("nothing was drafted")


def _metric(
    key: str,
    label: str,
    unit: str,
    better: bool | None,
    definition: str,
    compute: Callable[[Kept], Any],
    *parts: Part,
) -> Metric:
    def value(run: RunTables) -> Any:
        found = kept(run)
        return found if isinstance(found, Missing) else compute(found)

    return Metric(("speculation", key), label, unit, better, definition, value, "Speculation", parts=parts)


METRICS: tuple[Metric, ...] = (
    _metric(
        "mean_length",
        "Acceptance length, bonus included",
        "tokens",
        True,
        "Tokens that a sequence with a draft gained in a step: 1 + accepted / drafts.",
        _mean_length,
        Part(summary=True),
    ),
    _metric(
        "acceptance",
        "Drafted tokens accepted",
        "ratio",
        True,
        "Accepted over drafted tokens.",
        _acceptance,
        Part(summary=True),
    ),
    _metric(
        "break_even_length",
        "Break-even length",
        "tokens",
        False,
        "Mean time of a decode-only step that verified drafts, drafting included, over that of one without.",
        _break_even,
        Part(summary=True),
    ),
    _metric(
        "draft_share",
        "Drafting, share of the step",
        "ratio",
        False,
        "Time of drafting over the time of the steps that verified drafts.",
        _draft_share,
        Part(summary=True),
    ),
    _metric(
        "drafted_share",
        "Decode-only steps with drafts",
        "ratio",
        None,
        "Share of the steps without prompt tokens that verified drafts.",
        _drafted_share,
        Part(summary=True),
    ),
    _metric(
        "drafts", "Drafts", "", None, "Drafts that were verified, one a sequence and step.", _drafts, Part()
    ),
    _metric("drafted_tokens", "Drafted tokens", "tokens", None, "Tokens drafted.", _drafted, Part()),
    _metric(
        "accepted_tokens",
        "Accepted tokens",
        "tokens",
        None,
        "Drafted tokens that were accepted; the bonus is none of them.",
        _accepted,
        Part(),
    ),
    _metric(
        "wasted_tokens",
        "Wasted tokens",
        "tokens",
        False,
        "Drafted tokens that were not accepted: computed and rolled back.",
        lambda found: _drafted(found) - _accepted(found),
        Part(),
    ),
    _metric(
        "drafted_step_s",
        "Step with drafts, mean",
        "s",
        False,
        "Mean time of a step without prompt tokens that verified drafts, drafting included.",
        _mean_s("drafted"),
        Part(),
    ),
    _metric(
        "plain_step_s",
        "Step without drafts, mean",
        "s",
        False,
        "Mean time of a step without prompt tokens and without drafts.",
        _mean_s("plain"),
        Part(),
    ),
    _metric(
        "unconditional_rates",
        "Accepted by place",
        "ratio",
        None,
        "For each place in a draft: the share of the drafts so long that were accepted up to there.",
        _unconditional,
    ),
    _metric(
        "conditional_rates",
        "Accepted by place, where those before were",
        "ratio",
        None,
        "For each place in a draft: how often its token was accepted where all before it were.",
        _conditional,
    ),
    _metric(
        "histogram",
        "Drafts by tokens accepted",
        "",
        None,
        "How many drafts had so many tokens accepted.",
        _histogram,
    ),
)
