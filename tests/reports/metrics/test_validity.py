"""What speaks against a run is said."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from backbench.reports.metrics import validity


def reasons(telemetry: Any = None, foreign: int | None = 0, **changes: Any) -> list[str]:
    counts = {"completed": 5, "intended": 8, "sent": 8, "failed": 0, "wrong_length": 0} | changes.get(
        "counts", {}
    )
    metrics = {"counts": counts, "context": {"interrupted": changes.get("interrupted", False)}}
    correctness = changes.get("correctness", {"passed": True})
    frame = pd.DataFrame(telemetry or [], columns=["time_ns", "throttle_reasons"])
    schedule = {"client_saturated": changes.get("saturated", False), "late_requests": changes.get("late")}
    return validity.reasons(
        metrics,
        schedule,
        correctness,
        frame,
        foreign,
        changes.get("failure"),
        changes.get("interpreted", False),
    )


def test_nothing_speaks_against_a_sound_run() -> None:
    assert reasons() == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"counts": {"failed": 3}}, "3 requests failed"),
        ({"counts": {"wrong_length": 1}}, "another number of tokens"),
        ({"interrupted": True}, "5 of 8 requests"),
        ({"saturated": True}, "saturated: requests went out slower"),
        ({"saturated": True, "late": 3}, "3 of 8 requests went out more than a step late; lower --rate"),
        ({"correctness": {"passed": False}}, "wrong results"),
        ({"correctness": {"passed": None, "reason": "no room"}}, "no room"),
        ({"foreign": 2}, "2 other processes"),
    ],
)
def test_each_reason(changes: dict[str, Any], words: str) -> None:
    (reason,) = reasons(**changes)
    assert words in reason


def test_a_failed_run_says_why_and_how_far_it_came() -> None:
    why, how_far = reasons(failure="BackendError: a kernel", interrupted=True)
    assert why == "failed: BackendError: a kernel"
    assert how_far.startswith("cut short: 5 of 8")


def test_throttling_counts_during_the_run_and_the_power_cap_does_not() -> None:
    before, cap, heat = (-5, 0x20), (5, 0x4), (6, 0x40)
    assert reasons([before, cap]) == []
    assert reasons([before, cap, heat]) == ["the GPU was throttled: hardware thermal slowdown"]


def test_times_of_the_interpreter_are_not_believed() -> None:
    (reason,) = reasons(interpreted=True)
    assert "interpreter" in reason
