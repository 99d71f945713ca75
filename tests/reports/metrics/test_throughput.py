"""Rates count what a stretch made, whoever asked for it; requests are judged only where they are measured."""

from __future__ import annotations

from typing import Any

import pytest
from scripted import metrics_section

from backbench.harness.frames import request_frame
from backbench.harness.replay import Replay, replay
from backbench.reports.metrics.compute import sections
from backbench.reports.metrics.requests import Context
from backbench.reports.metrics.run import RunTables
from backbench.reports.record import RunDirectory
from backbench.workloads.request import Request

EVERYTHING = ("metrics", "schedule", "roofline")


def handed_over(make_target: Any, make_workload: Any, clock: Any) -> tuple[Replay, Any]:
    """Two slots. Warm-up -1 ends at 20 ms and frees the first slot, which is time zero of the run; warm-up
    -2 goes on to 60 ms and gets five tokens more. Four measured requests of two tokens, 10 + 10 ms each."""
    script: dict[int, Any] = {i: [(10, 1), (20, 1)] for i in range(4)}
    script |= {-1: [(10, 1), (20, 1)], -2: [(10, 1), *((t, 1) for t in (25, 30, 40, 50, 60))]}
    warmup = [Request(-1, 0, (1,) * 4, 2), Request(-2, 0, (2,) * 4, 6)]
    workload = make_workload([2] * 4, concurrency=2)
    return replay(make_target(script), workload, warmup=warmup, clock=clock), workload


@pytest.fixture
def run(make_target: Any, make_workload: Any, make_context: Any, make_steps: Any, clock: Any) -> RunTables:
    done, workload = handed_over(make_target, make_workload, clock)
    context: Context = make_context(
        mode="closed", end_ns=done.end_ns - done.start_ns, concurrency=workload.concurrency, gpus=2
    )
    return RunTables.read(request_frame(done), make_steps(), context)


def test_tokens_of_handed_over_warm_up_requests_count(run: RunTables) -> None:
    """From the first measured request (20 ms) on: 8 measured tokens and 5 of the warm-up's in 60 ms."""
    found = sections(run, ["metrics"])["metrics"]
    assert found["whole_run"]["duration_s"] == pytest.approx(0.060)
    assert found["output_tokens_per_s"]["whole_run"] == pytest.approx(13 / 0.060)
    assert found["output_tokens_per_s_per_gpu"]["whole_run"] == pytest.approx(13 / 0.060 / 2)
    # Its prompt was read before the run: its first token lies there.
    assert found["total_tokens_per_s"]["whole_run"] == pytest.approx((13 + 4 * 4) / 0.060)
    assert found["requests_per_s"] == pytest.approx(5 / 0.060)


def test_they_are_no_measured_requests(run: RunTables) -> None:
    found = sections(run, ["metrics"])["metrics"]
    assert found["counts"]["intended"] == found["counts"]["completed"] == 4
    assert found["output_tokens"] == 8
    assert found["prompt_tokens"] == 16
    assert found["ttft_s"]["count"] == 4
    assert found["itl_s"]["count"] == 4
    assert found["e2e_s"]["max"] == pytest.approx(0.020)


def test_the_table_marks_them(make_target: Any, make_workload: Any, clock: Any) -> None:
    done, _ = handed_over(make_target, make_workload, clock)
    frame = request_frame(done)
    assert frame.loc[frame["warmup"], "request_id"].tolist() == [-1, -2]
    assert frame.loc[~frame["warmup"], "request_id"].tolist() == [0, 1, 2, 3]
    assert frame["sent_ns"].tolist()[-2:] == [-20_000_000, -20_000_000]


def test_a_steady_states_total_counts_prompts_where_they_answered(
    make_target: Any, make_workload: Any, make_context: Any, make_steps: Any, clock: Any
) -> None:
    """Two slots, six requests of 10 + 10 ms: steady from 10 to 40 ms, in which two pairs began."""
    workload = make_workload([2] * 6, concurrency=2)
    done = replay(make_target({i: [(10, 1), (20, 1)] for i in range(6)}), workload, clock=clock)
    context = make_context(mode="closed", end_ns=60_000_000, concurrency=2)
    rows = RunTables.read(request_frame(done), make_steps(), context).rows
    found = metrics_section(rows, make_steps(), context)
    # Tokens at 20, 30, 40 ms; first tokens at 30 ms (that at 10 ms opens the window and lies outside).
    assert found["total_tokens_per_s"]["steady_state"] == pytest.approx((6 + 2 * 4) / 0.030)


def test_every_null_has_its_reason_beside_it(run: RunTables, cpu_run: RunDirectory) -> None:
    """Also where there is nothing: no request, no step, no SLO, no GPU, no peak."""
    requests, steps = cpu_run.read_requests(), cpu_run.read_steps()
    context = Context.from_dict(cpu_run.read_record().metrics["context"])
    whole = RunTables.read(requests, steps, context)
    nothing = RunTables.read(requests.iloc[:0], steps.iloc[:0], context)
    for each in (run, whole, nothing):
        for name, section in sections(each, EVERYTHING).items():
            assert unexplained(section, section.get("absent") or {}) == [], name


def unexplained(value: Any, reasons: dict[str, str], path: str = "", told: bool = False) -> list[str]:
    """Dotted paths of nulls without a reason in the same object, or in `absent` for it or what holds it."""
    told = told or bool(reasons.get(path))
    if isinstance(value, dict):
        beside = told or bool(value.get("reason") or value.get("unsupported"))
        return [
            each
            for key, inner in value.items()
            for each in unexplained(inner, reasons, f"{path}.{key}" if path else key, beside)
        ]
    return [path] if value is None and not told else []
