"""Acceptance and what it cost, from the counts that a record keeps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from backbench.reports.metrics.metric import Missing
from backbench.reports.metrics.speculation import METRICS

KEPT: dict[str, Any] = {
    # Three drafts of 2 tokens with 0, 1 and 2 accepted, and four of 1 token, all accepted.
    "outcomes": {"drafted": [1, 2, 2, 2], "accepted": [1, 0, 1, 2], "drafts": [4, 1, 1, 1]},
    "draft_s": 0.5,
    "drafted_steps": 4,
    "drafted_steps_s": 2.0,
    "plain_steps": 12,
    "plain_steps_s": 4.0,
}


def values(section: dict[str, Any]) -> dict[str, Any]:
    run: Any = SimpleNamespace(given={"speculation": section})
    return {metric.path[-1]: metric.compute(run) for metric in METRICS if metric.compute is not None}


def test_every_number() -> None:
    assert values(KEPT) == {
        "mean_length": pytest.approx(2.0),
        "acceptance": pytest.approx(0.7),
        "break_even_length": pytest.approx(1.5),
        "draft_share": pytest.approx(0.25),
        "drafted_share": pytest.approx(0.25),
        "drafts": 7,
        "drafted_tokens": 10,
        "accepted_tokens": 7,
        "wasted_tokens": 3,
        "drafted_step_s": pytest.approx(0.5),
        "plain_step_s": pytest.approx(1 / 3),
        "unconditional_rates": {"1": pytest.approx(6 / 7), "2": pytest.approx(1 / 3)},
        "conditional_rates": {"1": pytest.approx(6 / 7), "2": pytest.approx(1 / 2)},
        "histogram": {"0": 1, "1": 5, "2": 1},
    }


def test_a_run_that_drafted_nothing_has_counts_and_reasons() -> None:
    nothing = KEPT | {"outcomes": {"drafted": [], "accepted": [], "drafts": []}}
    found = values(nothing | {"drafted_steps": 0, "drafted_steps_s": 0.0, "draft_s": 0.0})
    assert found["drafts"] == found["wasted_tokens"] == 0
    assert found["drafted_share"] == 0
    missing = {name for name, value in found.items() if isinstance(value, Missing)}
    assert {"mean_length", "acceptance", "break_even_length", "histogram", "conditional_rates"} <= missing


def test_a_run_without_speculation_says_so() -> None:
    for section, reason in (({}, "did not speculate"), ({"reason": "killed"}, "killed")):
        assert all(
            isinstance(value, Missing) and reason in value.reason for value in values(section).values()
        )
