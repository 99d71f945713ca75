"""The engine as a target: tokens are stamped once, an idle poll is short, an abort leaves nothing."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_fixtures import open_small

from backbench.engine.engine import Engine
from backbench.harness.experiment import make_workload
from backbench.harness.options import RunOptions
from backbench.harness.subjects.engine import EngineSubject, EngineTarget
from backbench.reports.metrics.roofline import Peaks
from backbench.workloads.request import Request


def test_requests_are_answered_token_by_token() -> None:
    target = EngineTarget(open_small())
    before = time.perf_counter_ns()
    sent = target.submit(Request(3, 0, (5, 6, 7), 4))
    assert before <= sent <= time.perf_counter_ns()
    events = []
    while target.engine.has_work:
        events += target.poll(None)
    assert [event.request_id for event in events] == [3] * 4
    assert sum(event.count or 0 for event in events) == 4
    assert [event.finished for event in events] == [False] * 3 + [True]
    assert all(sent < event.time_ns <= time.perf_counter_ns() for event in events)
    assert len(target.steps) >= 4


def test_an_idle_poll_returns_by_its_deadline_and_soon() -> None:
    target = EngineTarget(open_small())
    start = time.perf_counter_ns()
    assert target.poll(start + 10_000_000) == []
    assert time.perf_counter_ns() >= start + 10_000_000
    start = time.perf_counter_ns()
    assert target.poll(start + 60 * 10**9) == []
    assert time.perf_counter_ns() - start < 10**9
    assert target.poll(None) == []


def test_abort_leaves_an_idle_engine() -> None:
    target = EngineTarget(open_small())
    for i in range(5):
        target.submit(Request(i, 0, (i + 1, 2, 3), 50))
    target.poll(None)
    target.abort()
    assert not target.engine.has_work
    assert target.engine.pool.num_used == 0


def options(**given: Any) -> RunOptions:
    return RunOptions(workload="batch:2x8+4", backend="torch", **given)


def prepared(**given: Any) -> EngineSubject:
    subject = EngineSubject(options(engine={"max_len": 128, "num_blocks": 64}, **given))
    workload = make_workload(options(), subject.limits())
    subject.prepare(workload, lambda text: None)
    return subject


def serve(subject: EngineSubject, prompts: int) -> None:
    target = subject.start()
    for i in range(prompts):
        target.submit(Request(i, 0, tuple(range(1, 18)), 2))
    while subject.engine.has_work:
        target.poll(None)


def test_peaks_and_counts_of_a_run_are_its_own() -> None:
    """A large run, and the check of results, leave nothing in the small one after them."""
    subject = prepared()
    serve(subject, 8)
    large = subject.memory().kv_used_peak_bytes
    subject.check(make_workload(options(), subject.limits()))
    subject.engine.scheduler.preemptions = subject.engine.runner.graph_misses = 3
    serve(subject, 1)
    small = subject.memory().kv_used_peak_bytes
    assert large is not None and small is not None
    assert 0 < 4 * small <= large
    assert subject.settings()["preemptions"] == subject.settings()["graph_misses"] == 0


def test_what_needs_an_untouched_device_comes_before_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle memory before anything of ours, then the peaks, whose copies the pool would leave no room for."""
    happened: list[str] = []

    def then(name: str, call: Any) -> Any:
        def noted(*arguments: Any, **given: Any) -> Any:
            happened.append(name)
            return call(*arguments, **given)

        return noted

    module = "backbench.harness.subjects.engine"
    monkeypatch.setattr(f"{module}.describe_accelerator", then("driver", lambda device: {}))
    monkeypatch.setattr(f"{module}.memory.idle_device_bytes", then("idle", lambda device, accelerator: None))
    monkeypatch.setattr(f"{module}.measure_peaks", then("peaks", lambda device, dtype: Peaks()))
    monkeypatch.setattr(Engine, "open", then("open", Engine.open))
    prepared()
    assert happened == ["driver", "idle", "peaks", "open"]


def test_a_tokenizer_is_built_for_text_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace of lengths runs on a model that has none, and builds none where there is one."""
    limits = EngineSubject(options(model="shape:qwen3-0.6b")).limits()
    trace = tmp_path / "trace.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
    )
    workload = make_workload(replace(options(), workload=str(trace)), limits)
    assert [request.output_tokens for request in workload.requests] == [44, 109]
    assert limits.tokenize is None

    def built(self: Any) -> Any:
        raise AssertionError("a tokenizer was built")

    limits = EngineSubject(options()).limits()
    with monkeypatch.context() as patch:
        patch.setattr("backbench.engine.models.checkpoint.DirectorySource.tokenizer", built)
        assert make_workload(replace(options(), workload=str(trace)), limits).requests
    assert limits.tokenize is not None and len(limits.tokenize("two words")) > 0
