"""The metric oracle: a target with known times and counts gives exactly the known metrics."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scripted import metrics_section

from backbench.harness.frames import request_frame
from backbench.harness.replay import replay
from backbench.reports.metrics.compute import compute
from backbench.reports.metrics.latency import per_request_tpot
from backbench.reports.metrics.requests import Requests, read_requests
from backbench.reports.metrics.window import most_in_flight, steady_state


@pytest.fixture
def measure(make_context: Any, clock: Any) -> Any:
    """Replay a scripted target and return (arrays of the rows, context)."""

    def run(target: Any, workload: Any, **context: Any) -> tuple[Requests, Any]:
        done = replay(target, workload, clock=clock)
        known = make_context(
            mode=done.mode,
            end_ns=done.end_ns - done.start_ns,
            interrupted=done.interrupted,
            concurrency=workload.concurrency,
            **context,
        )
        return read_requests(request_frame(done), known), known

    return run


def test_oracle_of_one_request(make_target: Any, make_workload: Any, measure: Any, make_steps: Any) -> None:
    """Sent at 0, tokens at 100, 120, 150, 200 ms: every number by hand."""
    target = make_target({0: [(100, 1), (120, 1), (150, 1), (200, 1)]})
    rows, context = measure(target, make_workload([4], prompt_tokens=6), gpus=2)
    found = metrics_section(rows, make_steps(), context)
    assert found["ttft_s"]["mean"] == pytest.approx(0.100)
    assert found["tpot_s"]["mean"] == pytest.approx(0.100 / 3)
    assert found["itl_s"]["count"] == 3
    assert found["itl_s"]["mean"] == pytest.approx(0.100 / 3)
    assert (found["itl_s"]["min"], found["itl_s"]["max"]) == pytest.approx((0.020, 0.050))
    assert found["e2e_s"]["mean"] == pytest.approx(0.200)
    assert found["normalized_latency_s"]["mean"] == pytest.approx(0.050)
    assert found["output_tokens_per_s"]["whole_run"] == pytest.approx(20.0)
    assert found["output_tokens_per_s_per_gpu"]["whole_run"] == pytest.approx(10.0)
    assert found["total_tokens_per_s"]["whole_run"] == pytest.approx(50.0)
    assert found["requests_per_s"] == pytest.approx(5.0)
    assert (found["prompt_tokens"], found["output_tokens"]) == (6, 4)


def test_oracle_of_a_closed_loop(make_target: Any, make_workload: Any, measure: Any, make_steps: Any) -> None:
    """Two slots, six requests of 10 + 10 ms: finished in pairs at 20, 40, 60 ms."""
    target = make_target({i: [(10, 1), (20, 1)] for i in range(6)})
    rows, context = measure(
        target, make_workload([2] * 6, concurrency=2), slo_s={"ttft": 0.01, "tpot": 0.009}
    )
    found = metrics_section(rows, make_steps(), context)
    assert found["ttft_s"]["p50"]["value"] == pytest.approx(0.010)
    assert found["ttft_sent_s"]["mean"] == pytest.approx(0.010)
    assert found["tpot_s"]["p50"]["value"] == pytest.approx(0.010)
    assert found["interactivity_tokens_per_s"]["p50"]["value"] == pytest.approx(100.0)
    assert found["whole_run"]["duration_s"] == pytest.approx(0.060)
    assert found["output_tokens_per_s"]["whole_run"] == pytest.approx(200.0)
    # B = 2, N = 6: from the second first token (10 ms) to the third finish (40 ms): tokens at 20, 30, 40.
    assert found["steady_state"] == {
        "start_s": pytest.approx(0.010),
        "end_s": pytest.approx(0.040),
        "duration_s": pytest.approx(0.030),
        "requests": 4,
    }
    assert found["output_tokens_per_s"]["steady_state"] == pytest.approx(6 / 0.030)
    assert found["goodput"]["attainment_by_slo"] == {"ttft": 1.0, "tpot": 0.0}
    assert found["goodput_requests_per_s"] == 0.0


def test_steady_state_of_a_fixed_batch(
    make_target: Any, make_workload: Any, measure: Any, make_steps: Any
) -> None:
    """All started at 20 ms, first finished at 50 ms: tokens at 30, 40, 50 from both."""
    target = make_target(
        {0: [(t, 1) for t in (10, 20, 30, 40, 50)], 1: [(t, 1) for t in (20, 30, 40, 50, 60, 70)]}
    )
    rows, context = measure(target, make_workload([5, 6]))
    found = metrics_section(rows, make_steps(), context)
    assert found["steady_state"]["start_s"] == pytest.approx(0.020)
    assert found["steady_state"]["end_s"] == pytest.approx(0.050)
    assert found["output_tokens_per_s"]["steady_state"] == pytest.approx(6 / 0.030)


def test_no_steady_state_says_why(make_target: Any, make_workload: Any, measure: Any) -> None:
    rows, context = measure(make_target({0: [(1, 1)], 1: [(1, 1)]}), make_workload([1, 1], concurrency=2))
    window, why = steady_state(rows, context)
    assert window is None
    assert why is not None
    assert "too few requests" in why


def test_open_loop_steady_state_uses_what_was_in_flight(
    make_target: Any, make_workload: Any, measure: Any
) -> None:
    """Batch limit 256, but never more than 2 in flight: the window is that of 2."""
    arrivals = [10 * i for i in range(8)]
    rows, context = measure(
        make_target({i: [(5, 1), (15, 1)] for i in range(8)}), make_workload([2] * 8, arrivals_ms=arrivals)
    )
    assert most_in_flight(rows) == 2
    window, _ = steady_state(rows, context)
    assert window is not None
    # Second first token at 15 ms; the 5th finish (8 - 2 - 1) at 40 + 15 ms.
    assert (window.start_ns, window.end_ns) == (15e6, 55e6)


def test_a_short_or_nearly_empty_window_is_no_steady_state(
    make_target: Any, make_workload: Any, measure: Any, make_steps: Any
) -> None:
    """Two slots, six requests of 10 + 10 ms: 30 ms in which four finished."""
    script = {i: [(10, 1), (20, 1)] for i in range(6)}
    for limits, reason in (
        ({"steady_least_s": 0.030, "steady_fewest_requests": 4}, None),
        ({"steady_least_s": 0.031}, "the batch was full for 0.03 s only, 0.031 s needed"),
        ({"steady_fewest_requests": 5}, "only 4 requests finished while the batch was full, 5 needed"),
    ):
        rows, context = measure(make_target(script), make_workload([2] * 6, concurrency=2), **limits)
        found = metrics_section(rows, make_steps(), context)
        assert found["steady_state"].get("reason") == reason
        assert (found["output_tokens_per_s"]["steady_state"] is None) == (reason is not None)


def test_failures_stay_in_the_denominator(
    make_target: Any, make_workload: Any, measure: Any, make_steps: Any
) -> None:
    script: dict[int, Any] = {i: [(10, 1), (20, 1)] for i in range(6)}
    script |= {i: [("error", 5)] for i in range(6, 8)}
    rows, context = measure(make_target(script), make_workload([2] * 8), slo_s={"ttft": 1.0})
    found = metrics_section(rows, make_steps(), context)
    assert found["counts"]["failed"] == 2
    assert found["goodput"]["attainment"] == 6 / 8
    assert found["ttft_s"]["failures"] == 2
    assert found["ttft_s"]["p50"]["high"] == np.inf
    assert found["interactivity_tokens_per_s"]["p50"]["low"] == 0.0


def test_an_slo_that_does_not_apply_is_left_out(
    make_target: Any, make_workload: Any, measure: Any, make_steps: Any
) -> None:
    """A request of one token has no TPOT: it is judged by TTFT alone."""
    rows, context = measure(
        make_target({0: [(10, 1)], 1: [(10, 1), (200, 1)]}),
        make_workload([1, 2]),
        slo_s={"ttft": 0.02, "tpot": 0.05},
    )
    found = metrics_section(rows, make_steps(), context)
    assert found["goodput"]["attainment"] == 0.5
    assert found["goodput"]["attainment_by_slo"] == {"ttft": 1.0, "tpot": 0.0}


def test_interrupted_run_counts_what_was_due(
    make_target: Any, make_workload: Any, measure: Any, make_steps: Any
) -> None:
    target = make_target({i: [(10, 1), (20, 1)] for i in range(9)}, interrupt_at_ms=45)
    rows, context = measure(target, make_workload([2] * 9, concurrency=1))
    found = metrics_section(rows, make_steps(), context)
    assert found["counts"] == {
        "intended": 3,
        "sent": 3,
        "completed": 2,
        "failed": 0,
        "unfinished": 1,
        "never_sent": 0,
        "wrong_length": 0,
    }


def test_prefix_cache_ratio_counts_after_the_start(
    make_steps: Any, make_context: Any, measure: Any, make_target: Any, make_workload: Any
) -> None:
    steps = make_steps(
        {"start_ns": -20, "end_ns": -10, "num_prefill_tokens": 100, "prefix_hit_tokens": 900},
        {"start_ns": 0, "end_ns": 10, "num_prefill_tokens": 30, "prefix_hit_tokens": 10},
    )
    rows, _ = measure(make_target({0: [(10, 1)]}), make_workload([1]))
    found = metrics_section(rows, steps, make_context(ideal_prefix_hit_ratio=0.5))["prefix_cache"]
    assert found == {"ideal": 0.5, "realised": 0.25, "hit_tokens": 10}


def test_tpot_is_null_for_one_token(make_target: Any, make_workload: Any, measure: Any) -> None:
    rows, _ = measure(make_target({0: [(10, 1)]}), make_workload([1]))
    assert np.isnan(per_request_tpot(rows)).all()


def test_sections_are_complete_without_steps(
    make_target: Any, make_workload: Any, clock: Any, make_context: Any, make_steps: Any
) -> None:
    done = replay(make_target({0: [(10, 1)]}), make_workload([1]), clock=clock)
    sections = compute(request_frame(done), make_steps(), make_context(mode=done.mode))
    assert set(sections) == {"metrics", "schedule", "roofline"}
    assert sections["roofline"]["decode_fit"]["intercept_s"] is None


@pytest.fixture
def sections(make_context: Any, make_steps: Any, clock: Any) -> Any:
    """Replay a scripted target and compute the record's sections from its request table."""

    def run(target: Any, workload: Any, **context: Any) -> dict[str, Any]:
        done = replay(target, workload, clock=clock)
        known = make_context(
            mode=done.mode,
            end_ns=done.end_ns - done.start_ns,
            interrupted=done.interrupted,
            concurrency=workload.concurrency,
            **context,
        )
        return compute(request_frame(done), make_steps(), known)

    return run


def test_a_gap_is_divided_by_the_tokens_that_ended_it(
    make_target: Any, make_workload: Any, sections: Any
) -> None:
    """Chunks of 1, 3 and 2 tokens at 10, 40, 50 ms: three gaps of 10 ms and two of 5 ms."""
    found = sections(make_target({0: [(10, 1), (40, 3), (50, 2)]}), make_workload([6]))["metrics"]
    assert found["itl_s"]["count"] == 5
    assert (found["itl_s"]["min"], found["itl_s"]["max"]) == pytest.approx((0.005, 0.010))
    assert found["itl_s"]["mean"] == pytest.approx(0.040 / 5)
    assert (found["icl_s"]["min"], found["icl_s"]["max"]) == pytest.approx((0.010, 0.030))
    assert found["icl_s"]["count"] == 2
    assert found["tpot_s"]["mean"] == pytest.approx(0.040 / 5)


def test_an_unknown_count_gives_no_gap_and_no_rate(
    make_target: Any, make_workload: Any, sections: Any
) -> None:
    target = make_target({0: [(10, 1), (90, None)], 1: [(10, 1), (20, 1)]})
    found = sections(target, make_workload([2, 2]))["metrics"]
    assert found["itl_s"]["count"] == 1
    assert found["itl_s"]["max"] == pytest.approx(0.010)
    assert found["icl_s"]["max"] == pytest.approx(0.080)
    assert found["output_tokens"] is None
    assert found["output_tokens_per_s"]["whole_run"] is None


def test_total_tokens_leave_out_the_prompts_that_gave_no_token(
    make_target: Any, make_workload: Any, sections: Any
) -> None:
    """6 prompt and 2 output tokens in 20 ms; the failed request's 6 prompt tokens bought nothing."""
    target = make_target({0: [(10, 1), (20, 1)], 1: [("error", 5)]})
    found = sections(target, make_workload([2, 2], prompt_tokens=6))["metrics"]
    assert found["total_tokens_per_s"]["whole_run"] == pytest.approx(8 / 0.020)
    assert found["output_tokens_per_s"]["whole_run"] == pytest.approx(2 / 0.020)


def test_a_failed_request_misses_every_limit_however_quick_it_was(
    make_target: Any, make_workload: Any, sections: Any
) -> None:
    """One answers in time, one fails after tokens in time, one fails before any: 1 of 3 by each limit."""
    script: dict[int, Any] = {
        0: [(10, 1), (20, 1)],
        1: [(10, 1), (20, 1), ("error", 21)],
        2: [("error", 5)],
    }
    limits = {"ttft": 1.0, "tpot": 1.0, "e2e": 1.0}
    found = sections(make_target(script), make_workload([2] * 3), slo_s=limits)["metrics"]
    assert found["goodput"]["attainment"] == pytest.approx(1 / 3)
    assert found["goodput"]["attainment_by_slo"] == pytest.approx(dict.fromkeys(limits, 1 / 3))
    assert found["goodput_requests_per_s"] == pytest.approx(1 / 0.020)


def test_a_limit_is_met_at_its_very_value_and_missed_above(
    make_target: Any, make_workload: Any, sections: Any
) -> None:
    target = make_target({0: [(10, 1), (20, 1)], 1: [(11, 1), (21, 1)]})
    found = sections(target, make_workload([2] * 2), slo_s={"ttft": 0.010})["metrics"]
    assert found["goodput"]["attainment"] == 0.5


def test_a_failure_is_infinitely_slow_in_every_latency_of_a_request(
    make_target: Any, make_workload: Any, sections: Any
) -> None:
    script: dict[int, Any] = {i: [(10, 1), (30, 1)] for i in range(5)} | {5: [("error", 5)]}
    found = sections(make_target(script), make_workload([2] * 6))["metrics"]
    for name in ("ttft_s", "ttft_sent_s", "tpot_s", "e2e_s", "normalized_latency_s"):
        assert found[name]["failures"] == 1, name
        assert found[name]["p50"]["high"] == np.inf, name
    # Sent when intended, so both count from the same moment.
    assert repr(found["ttft_sent_s"]) == repr(found["ttft_s"])
    assert found["interactivity_tokens_per_s"]["p50"]["low"] == 0.0


def test_latencies_count_from_the_intended_time_and_one_from_the_sending(
    make_target: Any, make_workload: Any, sections: Any
) -> None:
    """Taking a request blocks for 20 ms: it lies in TTFT and E2E, and not in `ttft_sent_s`."""
    workload = make_workload([2] * 2, arrivals_ms=[0, 500])
    found = sections(make_target({i: [(10, 1), (40, 1)] for i in range(2)}, submit_ms=20), workload)
    assert found["metrics"]["ttft_s"]["mean"] == pytest.approx(0.030)
    assert found["metrics"]["ttft_sent_s"]["mean"] == pytest.approx(0.010)
    assert found["metrics"]["e2e_s"]["mean"] == pytest.approx(0.060)
    assert found["metrics"]["normalized_latency_s"]["mean"] == pytest.approx(0.030)
    assert found["schedule"]["lag_s"]["mean"] == pytest.approx(0.020)


def test_what_was_due_and_never_sent_stays_in_an_interrupted_run(
    make_target: Any, make_workload: Any, sections: Any, clock: Any
) -> None:
    """Due at 0, 30, 40 ms and 1 s; interrupted at 100 ms while the second was being taken."""
    target = make_target({0: [(20, 1)]}, submit_ms=50)
    submit = target.submit

    def stopped(request: Any) -> int:
        if request.id == 1:
            clock.now_ns += 50_000_000
            raise KeyboardInterrupt
        return submit(request)  # type: ignore[no-any-return]

    target.submit = stopped
    workload = make_workload([1] * 4, arrivals_ms=[0, 30, 40, 1000])
    found = sections(target, workload, slo_s={"ttft": 1.0})
    counts = found["metrics"]["counts"]
    assert (counts["intended"], counts["sent"], counts["never_sent"]) == (3, 1, 2)
    assert found["metrics"]["goodput"]["attainment"] == 0.0
    assert found["schedule"]["never_sent"] == 2
