"""The schedule section: offered against achieved, lag, and burstiness."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from backbench.harness.frames import request_frame
from backbench.harness.replay import replay
from backbench.reports.metrics import schedule
from backbench.reports.metrics.requests import read_requests
from backbench.reports.metrics.schedule import late


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


@pytest.mark.parametrize(
    ("submit_ms", "requests", "saturated"), [(12, 40, True), (12, 12, False), (1, 40, False)]
)
def test_a_client_that_cannot_keep_up_is_saturated(
    make_target: Any,
    make_workload: Any,
    clock: Any,
    make_context: Any,
    submit_ms: int,
    requests: int,
    saturated: bool,
) -> None:
    """Taking a request blocks 12 ms, one is due each 10 ms: the lag grows by 2 ms a request. A dozen are too
    few to say it."""
    workload = make_workload([1] * requests, arrivals_ms=[10 * i for i in range(requests)])
    target = make_target({i: [(5, 1)] for i in range(requests)}, submit_ms=submit_ms)
    assert section(target, workload, clock, make_context)["client_saturated"] is saturated


def rows(intended_ms: list[float], sent_ms: list[float], first_ms: list[float]) -> Any:
    names = {"intended_ns": intended_ms, "sent_ns": sent_ms, "first_ns": first_ms}
    return SimpleNamespace(**{name: np.array(each) * 1e6 for name, each in names.items()})


def test_a_step_under_way_is_the_engines_and_not_the_clients() -> None:
    """Steps of 100 ms: what falls due in one goes out after it, or after the next, whose turn had come."""
    starts = np.arange(0, 1000, 100) * 10**6
    steps = pd.DataFrame({"start_ns": starts, "end_ns": starts + 100 * 10**6})
    due = [110.0, 110.0, 110.0, 110.0]
    sent, first = [200.0, 300.0, 301.0, 301.0], [400.0, 400.0, 400.0, 4000.0]
    # The last was late, too, but by a twentieth of its TTFT.
    assert late(rows(due, sent, first), steps).tolist() == [False, False, True, False]
    assert late(rows(due, sent, first), None).tolist() == [True, True, True, False]


def test_a_late_request_without_a_first_token_counts() -> None:
    assert late(rows([0.0], [6.0], [np.nan]), None).tolist() == [True]
    assert late(rows([0.0], [4.0], [np.nan]), None).tolist() == [False]  # a time slice
    assert late(rows([0.0], [np.nan], [np.nan]), None).tolist() == []
