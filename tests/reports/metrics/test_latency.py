"""Samples of the latencies: the same for the table and the figure, and honest about what never came."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from backbench.harness.frames import request_frame
from backbench.harness.replay import replay
from backbench.reports.metrics.latency import METRICS, itl, ttft
from backbench.reports.metrics.run import RunTables


@pytest.fixture
def replayed(make_context: Any, make_steps: Any, clock: Any) -> Any:
    """Replay a scripted target and return the run's tables."""

    def run(target: Any, workload: Any, **context: Any) -> RunTables:
        done = replay(target, workload, clock=clock)
        known = make_context(
            mode=done.mode,
            end_ns=done.end_ns - done.start_ns,
            interrupted=done.interrupted,
            concurrency=workload.concurrency,
            **context,
        )
        return RunTables.read(request_frame(done), make_steps(), known)

    return run


def value(run: RunTables, key: str) -> Any:
    metric = next(each for each in METRICS if each.path == ("metrics", key))
    assert metric.compute is not None
    return metric.compute(run)


def test_a_chunk_of_several_tokens_shares_its_gap(
    make_target: Any, make_workload: Any, replayed: Any
) -> None:
    run = replayed(make_target({0: [(1000, 1), (5000, 4)]}), make_workload([5]))
    assert itl(run).values_s.tolist() == [1.0] * 4


def test_a_request_with_an_unknown_count_gives_no_gap_in_table_and_figure(
    make_target: Any, make_workload: Any, replayed: Any
) -> None:
    """Chunks after 10, 20, 30 and 110 ms, one of unknown size: the figure once drew its other gaps too."""
    script = {0: [(10, 1), (20, 1), (30, None), (110, 1)], 1: [(10, 1), (20, 1), (30, 1)]}
    run = replayed(make_target(script), make_workload([4, 3]))
    samples = itl(run)
    assert samples.values_s.tolist() == pytest.approx([0.010, 0.010])
    assert set(samples.owners.tolist()) == {1}
    found = value(run, "itl_s")
    assert (found["count"], found["requests_without_counts"]) == (2, 1)
    assert value(run, "icl_s")["max"] == pytest.approx(0.080)


def test_due_requests_of_a_cut_off_run_enter_the_quantiles(
    make_target: Any, make_workload: Any, replayed: Any
) -> None:
    """Ten at once on four slots; at 40 ms four had finished, four had begun, two waited."""
    script = {i: [(10, 1), (30, 1)] for i in range(10)}
    target = make_target(script, slots=4, interrupt_at_ms=35)
    run = replayed(target, make_workload([2] * 10))
    samples = ttft(run)
    assert (len(samples.values_s), samples.never) == (8, 2)
    assert value(run, "ttft_s")["failures"] == 2
    assert value(run, "ttft_s")["p50"]["value"] == pytest.approx(0.040)
    found = value(run, "e2e_s")
    assert (found["count"], found["failures"]) == (4, 6)
    assert found["p50"]["value"] == np.inf
    assert value(run, "tpot_s")["failures"] == 6


def test_a_complete_run_has_nothing_cut_off(make_target: Any, make_workload: Any, replayed: Any) -> None:
    run = replayed(make_target({i: [(10, 1), (30, 1)] for i in range(8)}), make_workload([2] * 8))
    assert value(run, "e2e_s")["failures"] == 0
