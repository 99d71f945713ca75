"""The highest load that holds, on queues whose capacity is known."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backbench.errors import HarnessError
from backbench.harness.experiment import Observer
from backbench.harness.load_search import Found, find_load, highest, judged, limits_of
from backbench.harness.options import RunOptions
from backbench.harness.subjects.scripted import Chunks, ScriptedSubject
from backbench.reports.metrics.statistics import wilson_trials
from backbench.reports.page.export import write_report
from backbench.reports.record.experiment import read_experiment
from backbench.reports.record.search import Limit, read_search
from backbench.reports.verify import examine_experiment
from backbench.workloads.request import Request

P95 = (Limit("ttft", 0.95, 0.5),)


class Queue(ScriptedSubject):
    """Serves `slots` at once, each for 50 ms, or for an exponential time of that mean."""

    loads = 0
    exponential = False

    def chunks(self, request: Request) -> Chunks:
        if not self.exponential:
            return [(50.0, 1)]
        return [(random.Random(request.id).expovariate(1 / 50.0), 1)]

    def prepare(self, workload: Any, stage: Any) -> None:
        Queue.loads += 1


def searched(path: Path, subject: Queue, slo: dict[str, float], n: int = 200, **load: Any) -> Found:
    load = {"input_lengths": "fixed:4", "output_lengths": "fixed:1", "num_requests": n} | load
    options = RunOptions(
        workload="synthetic",
        backend="scripted",
        find_load=True,
        probe_seconds=5.0,
        warmup=0,
        slo_s=slo,
        load=load,
        out=path,
    )
    return find_load(options, Observer(), lambda options: subject)


def test_an_even_stream_holds_up_to_what_the_server_can_do(tmp_path: Path) -> None:
    """Arrivals each 1/R s and 50 ms of service: no wait up to 20 a second, a growing one beyond."""
    Queue.loads = 0
    found = searched(tmp_path / "s", Queue(slots=1), {"ttft_p95": 0.06}, rate=3.0, arrival="constant")
    held, over = found.search.held, found.search.exceeded
    assert held is not None and over is not None and found.code == 0
    assert held.load <= 20.0 < over.load and over.load / held.load < 1.06
    assert Queue.loads == 1, "the model is loaded once"


def test_a_random_stream_holds_what_queueing_theory_says(tmp_path: Path) -> None:
    """M/M/1, first come first served: the time in the system is exponential with rate mu - lambda, so that
    95 % are within 0.5 s up to lambda = mu - ln(20) / 0.5 = 14.0 a second of 20.

    Neighbouring times go together, and 1,500 of them miss the 95 % by some: 15 % either way."""
    queue = Queue(slots=1)
    queue.exponential = True
    found = searched(tmp_path / "s", queue, {"ttft_p95": 0.5}, n=1500, rate=4.0)
    right = 20 - math.log(20) / 0.5
    assert found.search.held is not None
    assert found.search.held.load == pytest.approx(right, rel=0.15)


def test_a_closed_loop_holds_as_many_as_are_served_at_once(tmp_path: Path) -> None:
    found = searched(tmp_path / "s", Queue(slots=5), {"ttft_p90": 0.06, "e2e_p50": 0.06}, concurrency=1)
    held, over = found.search.held, found.search.exceeded
    assert held is not None and over is not None
    assert (held.load, over.load) == (5, 6)
    assert [probe.load for probe in found.search.probes] == [1, 2, 4, 8, 6, 5]


def test_a_start_that_is_too_high_goes_down(tmp_path: Path) -> None:
    found = searched(tmp_path / "s", Queue(slots=1), {"ttft_p50": 0.06}, rate=64.0, arrival="constant")
    assert found.search.held is not None and found.search.held.load == pytest.approx(20, rel=0.06)


def test_where_nothing_holds_that_is_said(tmp_path: Path) -> None:
    found = searched(tmp_path / "s", Queue(slots=1), {"ttft_p95": 0.01}, n=80, concurrency=2)
    assert found.search.held is None
    assert found.search.conclusion() == (
        "No load holds ttft_p95 0.01 s; it does not at 1 at once, the lowest tried."
    )
    rate = searched(tmp_path / "r", Queue(slots=1), {"ttft_p95": 0.01}, n=80, rate=30.0, arrival="constant")
    assert rate.search.held is None
    assert [probe.load for probe in rate.search.probes] == [30, 15], "at 15 a second no two requests meet"


def test_every_probe_is_a_run_that_verifies_and_the_page_has_the_answer(tmp_path: Path) -> None:
    found = searched(tmp_path / "s", Queue(slots=3), {"ttft_p95": 0.06}, concurrency=1)
    experiment = read_experiment(tmp_path / "s")
    assert [run.path for run in experiment.runs] == [probe.run for probe in found.search.probes]
    assert experiment.finished and experiment.arms[0] == "1 at once"
    assert examine_experiment(tmp_path / "s").problems == ()
    assert read_search(tmp_path / "s") == found.search
    record = experiment.directory(experiment.runs[0]).read_record()
    assert record.metrics["goodput"]["slo_s"] == {"ttft": 0.06}
    assert record.metrics["goodput"]["attainment"] == 1.0
    write_report([tmp_path / "s"], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "The highest load that holds ttft_p95 0.06 s is 3 at once" in page
    assert 'id="figure-front-ttft"' in page, "throughput against latency, a point a load"
    assert "do not compare" not in page


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"slo_s": {}}, "give --slo"),
        ({"slo_s": {"ttft": 0.5}}, "ttft_p95=0.5"),
        ({"repeat": 2}, "repeats nothing"),
        ({"load": {"all_at_once": True}}, "--all-at-once fixes the load"),
        ({"load": {"num_requests": 10}}, "give -n 73 or more"),
    ],
)
def test_what_cannot_be_searched_is_refused(tmp_path: Path, given: dict[str, Any], words: str) -> None:
    options = RunOptions(
        workload="synthetic", backend="scripted", find_load=True, slo_s={"ttft_p95": 0.5}, out=tmp_path / "s"
    )
    with pytest.raises(HarnessError, match=words):
        find_load(replace(options, **given), Observer(), lambda options: Queue())
    assert not (tmp_path / "s").exists()


@given(
    threshold=st.floats(0.01, 5000),
    start=st.floats(0.5, 50),
)
@settings(max_examples=200)
def test_the_bisection_ends_around_the_threshold(threshold: float, start: float) -> None:
    asked: list[float] = []

    def holds(load: float) -> bool:
        asked.append(load)
        return load <= threshold

    low, high = highest(holds, start, whole=False)
    assert low is not None and high is not None
    assert low <= threshold < high <= low * 1.05
    assert len(asked) == len(set(asked)) < 35


@given(threshold=st.integers(0, 3000), start=st.integers(1, 64))
def test_whole_numbers_are_found_to_5_percent_or_exactly(threshold: int, start: int) -> None:
    low, high = highest(lambda load: load <= threshold, start, whole=True)
    if threshold == 0:
        assert (low, high) == (None, 1)
        return
    assert low is not None and high is not None
    assert low <= threshold < high and (high - low == 1 or high <= low * 1.05)
    assert low == int(low)


def test_a_verdict_needs_enough_requests() -> None:
    assert wilson_trials(0.95) == 73
    assert judged({"ttft_p95": (73, 73)}, P95) == ("holds", "")
    assert judged({"ttft_p95": (72, 72)}, P95)[0] == "unclear"
    assert judged({"ttft_p95": (190, 200)}, P95)[0] == "unclear"
    assert judged({"ttft_p95": (180, 200)}, P95) == ("fails", "")
    assert limits_of({"ttft_p99.9": 1.0})[0].name == "ttft_p99.9"
