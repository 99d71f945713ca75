"""The schedule section: offered against achieved, lag, and burstiness."""

from __future__ import annotations

from typing import Any

import pytest

from backbench.harness.frames import request_frame
from backbench.harness.replay import replay
from backbench.reports.metrics import schedule
from backbench.reports.metrics.requests import read_requests


def section(target: Any, workload: Any, clock: Any, make_context: Any) -> dict[str, Any]:
    done = replay(target, workload, clock=clock)
    context = make_context(mode=done.mode, concurrency=workload.concurrency)
    return schedule.section(read_requests(request_frame(done), context), context)


def test_constant_arrivals(make_target: Any, make_workload: Any, clock: Any, make_context: Any) -> None:
    arrivals = [20 * i for i in range(100)]
    target = make_target({i: [(5, 1)] for i in range(100)}, submit_ms=1)
    found = section(target, make_workload([1] * 100, arrivals_ms=arrivals), clock, make_context)
    assert found["offered_requests_per_s"] == pytest.approx(50)
    assert found["achieved_requests_per_s"] == pytest.approx(50)
    assert found["index_of_dispersion"] == pytest.approx(0, abs=0.05)
    assert found["index_of_dispersion_sent"] == pytest.approx(0, abs=0.05)
    assert found["lag_s"]["p95"]["value"] == pytest.approx(0.001)
    assert found["client_saturated"] is False
    assert found["never_sent"] == 0


def test_dispersion_is_the_samples_variance_over_the_mean_in_whole_windows() -> None:
    """Windows of 10 from 0 hold 3, 1 and 2 arrivals: variance 2 / 2, mean 2; the one at 33 is left out."""
    assert schedule.index_of_dispersion([0, 1, 2, 10, 20, 29, 33], 10) == pytest.approx(0.5)
    assert schedule.index_of_dispersion([0, 19], 10) is None


def test_a_closed_loop_offers_no_rate(
    make_target: Any, make_workload: Any, clock: Any, make_context: Any
) -> None:
    target = make_target({i: [(10, 1)] for i in range(4)})
    found = section(target, make_workload([1] * 4, concurrency=1), clock, make_context)
    assert found["offered_requests_per_s"] is None
    assert found["index_of_dispersion"] is None
    assert found["achieved_requests_per_s"] is None
    assert found["concurrency"] == 1
