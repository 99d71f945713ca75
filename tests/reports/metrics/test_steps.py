"""The time of steps that overlap, and the decodes whose time is their own."""

from __future__ import annotations

from typing import Any

import pytest

from backbench.reports.metrics.steps import plain_decodes, step_times_ns


def test_overlapped_steps_count_once(make_steps: Any) -> None:
    """Each step is launched while the one before runs: what it adds is end to end, not start to end."""
    steps = make_steps(
        {"start_ns": 0, "end_ns": 100},
        {"start_ns": 50, "end_ns": 200},
        {"start_ns": 150, "end_ns": 300},
        {"start_ns": 1000, "end_ns": 1100},
    )
    assert step_times_ns(steps).tolist() == [100, 100, 100, 100]


@pytest.mark.parametrize(
    ("following", "plain"),
    [
        ({"start_ns": 150, "num_prefill_tokens": 900}, False),
        ({"start_ns": 150, "num_prefill_tokens": 90, "graph": True}, True),
        ({"start_ns": 200, "num_prefill_tokens": 900}, True),
        ({"start_ns": 150, "num_decodes": 1}, True),
    ],
    ids=["prompts launched singly", "prompts in a graph", "no overlap", "a decode launched singly"],
)
def test_a_decode_seen_to_end_late_is_not_plain(make_steps: Any, following: Any, plain: bool) -> None:
    steps = make_steps(
        {"start_ns": 0, "end_ns": 100, "num_decodes": 1, "graph": True},
        {"start_ns": 50, "end_ns": 200, "num_decodes": 1, "graph": True},
        {"end_ns": 300} | following,
    )
    assert plain_decodes(steps).tolist()[:2] == [True, plain]


def test_prompts_idle_steps_and_the_warm_up_are_no_decodes(make_steps: Any) -> None:
    steps = make_steps(
        {"start_ns": -20, "end_ns": -10, "num_decodes": 1},
        {"start_ns": 0, "end_ns": 10, "num_decodes": 1, "num_prefill_tokens": 5},
        {"start_ns": 10, "end_ns": 20},
        {"start_ns": 20, "end_ns": 30, "num_decodes": 1},
    )
    assert plain_decodes(steps).tolist() == [False, False, False, True]
    assert plain_decodes(steps[:0]).tolist() == []
