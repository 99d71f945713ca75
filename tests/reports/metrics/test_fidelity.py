"""Fidelity by hand: arrivals, lengths and prefix hits against the workload's own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import metrics_section

from backbench.harness.frames import request_frame
from backbench.harness.replay import replay, salted_warmup
from backbench.reports.metrics.fidelity import ks_distance
from backbench.reports.metrics.requests import read_requests, read_with_warmup


def fidelity(done: Any, steps: Any, context: Any) -> Any:
    return metrics_section(read_requests(request_frame(done), context), steps, context)


def test_late_sendings_and_wrong_lengths_show(
    make_target: Any, make_workload: Any, clock: Any, make_context: Any, make_steps: Any
) -> None:
    """Taking one blocks 25 ms: sent at 25, 55, 80 instead of 0, 30, 40; behind by one of three, then two."""
    workload = make_workload([1, 1, 2], arrivals_ms=[0, 30, 40])
    target = make_target({i: [(100, 1)] for i in range(3)}, submit_ms=25)
    found = fidelity(replay(target, workload, clock=clock), make_steps(), make_context())["fidelity"]
    assert found["arrival_distance"] == pytest.approx(2 / 3)
    assert found["largest_lag_s"] == pytest.approx(0.040)
    assert found["exact_lengths"] == pytest.approx(2 / 3)
    assert found["output_ratio"] == pytest.approx(3 / 4)
    assert found["prefix_hits"] is None


def test_a_punctual_client_has_no_distance(
    make_target: Any, make_workload: Any, clock: Any, make_context: Any, make_steps: Any
) -> None:
    target = make_target({i: [(100, 1)] for i in range(3)})
    done = replay(target, make_workload([1] * 3, arrivals_ms=[0, 30, 40]), clock=clock)
    found = fidelity(done, make_steps(), make_context())["fidelity"]
    assert (found["arrival_distance"], found["largest_lag_s"], found["exact_lengths"]) == (0, 0, 1)


def test_prefix_hits_are_held_against_the_ideal(
    make_target: Any, make_workload: Any, clock: Any, make_context: Any, make_steps: Any
) -> None:
    """30 of 100 prompt tokens were found where 40 % could have been."""
    done = replay(make_target({0: [(5, 1)]}), make_workload([1]), clock=clock)
    steps = make_steps({"end_ns": 10, "num_prefill_tokens": 70, "prefix_hit_tokens": 30})
    found = fidelity(done, steps, make_context(mode="all_at_once", ideal_prefix_hit_ratio=0.4))
    assert found["fidelity"]["prefix_hits"] == pytest.approx(-0.1)
    assert found["fidelity"]["arrival_distance"] is None
    assert "no schedule" in found["absent"]["fidelity.arrival_distance"]


def test_hits_that_a_warm_up_dilutes_are_not_held_against_the_ideal(
    make_target: Any, make_workload: Any, clock: Any, make_context: Any, make_steps: Any
) -> None:
    """A warm-up's 4 prompt tokens in a run of 8: whose the hits are is unknown, and known once it is over."""
    workload = make_workload([1, 1], concurrency=2)
    warmup = salted_warmup(workload, 1, 100, 0)
    steps = make_steps({"end_ns": 10, "num_prefill_tokens": 70, "prefix_hit_tokens": 30})
    for first_ms, diluted in ((9, True), (2, False)):
        target = make_target({-1: [(first_ms, 1), (10, 0)], 0: [(3, 1)], 1: [(5, 1)]})
        done = replay(target, workload, warmup=warmup, clock=clock)
        done = replace(done, start_ns=done.start_ns + 3 * 10**6)
        context = make_context(mode="closed", ideal_prefix_hit_ratio=0.4)
        frame = request_frame(done)
        rows, everyone = read_requests(frame, context), read_with_warmup(frame)
        found = metrics_section(rows, steps, context, everyone)["fidelity"]["prefix_hits"]
        assert found is None if diluted else found == pytest.approx(-0.1)


SAMPLES = st.lists(st.floats(0, 100), min_size=1, max_size=20)


@given(SAMPLES, SAMPLES)
def test_the_distance_is_the_largest_gap_of_two_distribution_functions(
    first: list[float], second: list[float]
) -> None:
    gaps = [
        abs(sum(a <= x for a in first) / len(first) - sum(b <= x for b in second) / len(second))
        for x in (*first, *second)
    ]
    assert ks_distance(np.array(first), np.array(second)) == pytest.approx(max(gaps))
