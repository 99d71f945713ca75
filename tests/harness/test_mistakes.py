"""One test for each of the known ways to measure this wrongly (docs/metrics.md lists them)."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripted import metrics_section

from backbench.harness.frames import request_frame
from backbench.harness.replay import replay, salted_warmup
from backbench.reports.metrics import schedule
from backbench.reports.metrics.latency import inter_chunk, inter_token
from backbench.reports.metrics.requests import read_requests

MS = 1_000_000


def measured(target: Any, workload: Any, clock: Any, make_context: Any, **context: Any) -> Any:
    done = replay(target, workload, clock=clock)
    known = make_context(mode=done.mode, concurrency=workload.concurrency, **context)
    return read_requests(request_frame(done), known), known


def test_mistake_01_dispersion_shows_arrivals_in_step() -> None:
    """Ten workers seeded alike send ten requests at each arrival: the index says 10, Poisson says 1."""
    rng = np.random.default_rng(3)
    poisson = np.cumsum(rng.exponential(1e7, 4000))
    alike = np.repeat(np.cumsum(rng.exponential(1e8, 400)), 10)
    single, tenfold = schedule.dispersion(poisson), schedule.dispersion(alike)
    assert single is not None and tenfold is not None
    # 400 windows: the index of a Poisson process has an sd of sqrt(2 / 399) = 0.07.
    assert abs(single - 1) < 4 * 0.07
    assert tenfold > 5


def test_mistake_02_constant_arrivals_have_no_dispersion() -> None:
    constant = np.arange(1000) * 1e7
    assert schedule.dispersion(constant) == pytest.approx(0, abs=0.02)


def test_mistake_03_time_stamps_are_used(make_target: Any, make_workload: Any, clock: Any) -> None:
    """The workload's times decide when a request is sent, also when the target is idle long before."""
    times = [0, 500, 2000]
    target = make_target({i: [(1, 1)] for i in range(3)})
    done = replay(target, make_workload([1] * 3, arrivals_ms=times), clock=clock)
    assert [round((trace.sent_ns - done.start_ns) / MS) for trace in done.traces if trace.sent_ns] == times


def test_mistake_04_warmup_is_the_same_in_every_process(make_workload: Any) -> None:
    """Known values: nothing in them may depend on hash()."""
    (request,) = salted_warmup(make_workload([3]), 1, vocab_size=100, seed=7)
    assert request.prompt == (74, 75, 76, 77)


def test_mistake_05_warmup_shares_no_prompt_with_the_measured(make_workload: Any) -> None:
    workload = make_workload([1, 2, 3], prompt_tokens=32)
    for seed in range(50):
        warmup = salted_warmup(workload, 3, vocab_size=100, seed=seed)
        for twin, salted in zip(workload.requests, warmup, strict=True):
            assert len(salted.prompt) == len(twin.prompt)
            assert salted.output_tokens == twin.output_tokens
            assert salted.prompt[0] != twin.prompt[0]
            assert salted.id < 0
            assert max(salted.prompt) < 100


def test_mistake_06_tpot_leaves_ttft_out(
    make_target: Any, make_workload: Any, clock: Any, make_context: Any, make_steps: Any
) -> None:
    """A first token after 10 s and ten more 10 ms apart: TPOT is 10 ms, whatever TTFT was."""
    target = make_target({0: [(10_000 + 10 * i, 1) for i in range(11)]})
    rows, context = measured(target, make_workload([11]), clock, make_context)
    found = metrics_section(rows, make_steps(), context)
    assert found["tpot_s"]["mean"] == pytest.approx(0.010)
    assert found["normalized_latency_s"]["mean"] == pytest.approx(10.1 / 11)


def test_mistake_06_itl_is_not_tpot(
    make_target: Any, make_workload: Any, clock: Any, make_context: Any, make_steps: Any
) -> None:
    """Gaps of 1, 1 and 97 ms: TPOT says 33 ms for all of them; ITL keeps the stall."""
    target = make_target({0: [(100, 1), (101, 1), (102, 1), (199, 1)]})
    rows, context = measured(target, make_workload([4]), clock, make_context)
    found = metrics_section(rows, make_steps(), context)
    assert found["tpot_s"]["max"] == pytest.approx(0.033)
    assert found["itl_s"]["max"] == pytest.approx(0.097)
    assert found["itl_s"]["min"] == pytest.approx(0.001)


def test_mistake_06_chunks_are_not_tokens_and_give_no_zeros(
    make_target: Any, make_workload: Any, clock: Any, make_context: Any, make_steps: Any
) -> None:
    """Chunks of 1, 4, 4 tokens 40 ms apart: 9 tokens, eight gaps of 10 ms, none of them zero."""
    target = make_target({0: [(100, 1), (140, 4), (180, 4)]})
    rows, context = measured(target, make_workload([9]), clock, make_context)
    itl_s, _, _ = inter_token(rows)
    assert itl_s.tolist() == pytest.approx([0.010] * 8)
    assert inter_chunk(rows)[0].tolist() == pytest.approx([0.040] * 2)
    found = metrics_section(rows, make_steps(), context)
    assert found["output_tokens"] == 9
    assert found["tpot_s"]["mean"] == pytest.approx(0.010)


def test_mistake_06_requested_length_never_stands_in(
    make_target: Any, make_workload: Any, clock: Any, make_context: Any, make_steps: Any
) -> None:
    """Without counts there is no ITL, TPOT or token rate; with fewer tokens than asked, those that came."""
    target = make_target({0: [(100, None), (140, None)]})
    rows, context = measured(target, make_workload([50]), clock, make_context)
    found = metrics_section(rows, make_steps(), context)
    assert found["output_tokens"] is None
    assert found["output_tokens_per_s"]["whole_run"] is None
    assert found["tpot_s"]["count"] == 0
    assert found["itl_s"]["count"] == 0
    assert found["itl_s"]["requests_without_counts"] == 1
    assert found["icl_s"]["count"] == 1
    assert found["ttft_s"]["mean"] == pytest.approx(0.100)
    short = make_target({0: [(100, 1), (110, 1)]})
    rows, context = measured(short, make_workload([50]), clock, make_context)
    found = metrics_section(rows, make_steps(), context)
    assert found["output_tokens"] == 2
    assert found["counts"]["wrong_length"] == 1


def test_mistake_07_the_queue_is_not_hidden(
    make_target: Any, make_workload: Any, clock: Any, make_context: Any, make_steps: Any
) -> None:
    """One slot of 100 ms, an arrival each 10 ms: the n-th waits for all before it, and TTFT says so."""
    workload = make_workload([1] * 5, arrivals_ms=[0, 10, 20, 30, 40])
    target = make_target({i: [(100, 1)] for i in range(5)}, slots=1)
    rows, context = measured(target, workload, clock, make_context)
    ttft_ms = (rows.first_ns - rows.intended_ns) / MS
    assert ttft_ms.tolist() == pytest.approx([100, 190, 280, 370, 460])
    found = metrics_section(rows, make_steps(), context)
    assert found["ttft_s"]["max"] == pytest.approx(0.460)
    assert found["counts"]["never_sent"] == 0


def test_mistake_07_a_slow_taker_does_not_shift_the_schedule(
    make_target: Any, make_workload: Any, clock: Any, make_context: Any, make_steps: Any
) -> None:
    """Taking a request blocks 50 ms: the lag is measured and TTFT counts from the intended time."""
    workload = make_workload([1] * 3, arrivals_ms=[0, 10, 20])
    target = make_target({i: [(1, 1)] for i in range(3)}, submit_ms=50)
    rows, context = measured(target, workload, clock, make_context)
    found = schedule.section(rows, context)
    assert found["lag_s"]["max"] == pytest.approx(0.130)
    assert found["late_requests"] == 3
    latencies = metrics_section(rows, make_steps(), context)
    assert latencies["ttft_s"]["max"] == pytest.approx(0.131)
    assert latencies["e2e_s"]["max"] == pytest.approx(0.131)
    assert latencies["ttft_sent_s"]["max"] == pytest.approx(0.001)


def test_mistake_08_no_wall_clock_in_intervals() -> None:
    """time.time and datetime appear only where a run is anchored to civil time or named."""
    pattern = re.compile(r"time\.time(_ns)?\(\)")
    root = Path(inspect.getfile(replay)).parent
    found = [
        (path.name, line.strip())
        for path in root.rglob("*.py")
        if path.parent.name != "serving"  # whose answers say when they were made, as the protocol has it
        for line in path.read_text().splitlines()
        if pattern.search(line)
    ]
    assert sorted(found) == [
        ("replay.py", "anchor = time.time_ns() - (clock() - start_ns)"),
        ("run_log.py", '"unix_minus_clock_ns": time.time_ns() - clock(),'),
    ]


def test_mistake_08_a_jump_of_the_wall_clock_changes_nothing(
    make_target: Any, make_workload: Any, clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    script = {i: [(10, 1), (20, 1)] for i in range(4)}

    def gaps() -> list[int]:
        done = replay(make_target(dict(script)), make_workload([2] * 4, concurrency=2), clock=clock)
        return [trace.chunk_ns[-1] - (trace.intended_ns or 0) for trace in done.traces]

    before = gaps()
    monkeypatch.setattr(time, "time_ns", lambda: -(10**18))
    monkeypatch.setattr(time, "time", lambda: -1e9)
    assert gaps() == before


def test_mistake_09_closed_loop_warmup_is_handed_over(
    make_target: Any, make_workload: Any, clock: Any
) -> None:
    """No start-up burst: the measured requests take the warm-up's slots one by one, while others run."""
    workload = make_workload([1] * 6, concurrency=3)
    warmup = salted_warmup(workload, 3, 100, 0)
    script = {-1: [(10, 1)], -2: [(20, 1)], -3: [(30, 1)]} | {i: [(30, 1)] for i in range(6)}
    target = make_target(script)
    done = replay(target, workload, warmup=warmup, clock=clock)
    intended = [((trace.intended_ns or 0) - done.start_ns) / MS for trace in done.traces]
    assert intended == [0, 10, 20, 30, 40, 50]
    assert target.most_in_flight == 3


def test_mistake_09_open_loop_warmup_runs_into_the_measured_stream(
    make_target: Any, make_workload: Any, clock: Any
) -> None:
    """Warm-up requests arrive before time zero with the stream's own gaps and are not waited for."""
    workload = make_workload([1] * 4, arrivals_ms=[0, 10, 20, 30])
    warmup = salted_warmup(workload, 2, 100, 0)
    target = make_target({i: [(500, 1)] for i in (-2, -1, 0, 1, 2, 3)})
    done = replay(target, workload, warmup=warmup, clock=clock)
    sent = [((trace.sent_ns or 0) - done.start_ns) / MS for trace in (*done.warmup, *done.traces)]
    assert sent == [-20, -10, 0, 10, 20, 30]
    assert target.most_in_flight == 6


def test_mistake_09_the_ramp_is_outside_the_steady_state(
    make_target: Any, make_workload: Any, clock: Any, make_context: Any, make_steps: Any
) -> None:
    """A slow first wave (prefill burst) does not weigh on the steady rate."""
    script = {i: [(1000, 1), (1010, 1)] for i in range(2)} | {i: [(10, 1), (20, 1)] for i in range(2, 20)}
    rows, context = measured(make_target(script), make_workload([2] * 20, concurrency=2), clock, make_context)
    found = metrics_section(rows, make_steps(), context)
    assert found["output_tokens_per_s"]["steady_state"] == pytest.approx(200, rel=0.05)
    assert found["output_tokens_per_s"]["whole_run"] < 40
