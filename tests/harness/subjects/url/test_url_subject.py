"""Whole runs against servers: right ones, faulty ones, and what stands in the record."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from faulty_server import Exchange, FaultyServer, event, usage

from backbench.harness import experiment
from backbench.harness.experiment import Observer
from backbench.harness.load_search import find_load
from backbench.harness.options import run_options
from backbench.harness.recording import recover
from backbench.harness.run_log import RunLog
from backbench.harness.subjects.url import calibration
from backbench.harness.subjects.url.subject import (
    UrlSubject,
    beyond_in_the_run,
    default_processes,
    expected_streams,
)
from backbench.reports.metrics.validity import BEYOND, BLACK_BOX, UNCALIBRATED, fails
from backbench.reports.page.html import render_report
from backbench.reports.record import RunDirectory, RunRecord
from backbench.reports.record.experiment import read_experiment
from backbench.reports.verify import examine_experiment, verify
from backbench.workloads.request import Request, Workload

pytestmark = pytest.mark.timeout(120)

TOKENIZER = Path(__file__).parents[4] / "engine" / "checkpoints" / "tiny"

LOAD = {
    "workload": "synthetic",
    "input_lengths": "fixed:8",
    "output_lengths": "fixed:5",
    "num_requests": 12,
    "concurrency": 3,
    "warmup": 2,
}
CALIBRATED = {
    "failed": 0,
    "streams": 3,
    "script_itl_s": 0.01,
    "script_chunks_per_s": 300.0,
    "added_token_s": {"p50": 1e-4, "p99": 3e-4, "max": 1e-3},
    "added_ttft_s": {"p50": 3e-4, "p99": 6e-4, "max": 1e-3},
}


def run(server: FaultyServer, out: Path, **given: Any) -> RunRecord:
    asked = LOAD | {"url": server.url, "out": out, "calibrate_client": False} | given
    outcome = experiment.run(run_options(asked), Observer())
    return outcome.record


async def right(exchange: Exchange) -> None:
    await exchange.whole()


def test_a_whole_run_against_a_server(tmp_path: Path) -> None:
    with FaultyServer(right) as server:
        server.metrics = "vllm:num_requests_running 2\nvllm:generation_tokens_total 5\n"
        record = run(server, tmp_path / "run")
    directory = RunDirectory.open(tmp_path / "run")
    assert record.run["status"] == "complete"
    assert record.metrics["counts"]["completed"] == 12
    assert record.metrics["output_tokens"] == 60
    assert record.metrics["ttft_s"]["p50"]["value"] > 0
    assert record.correctness == {"passed": None, "reason": BLACK_BOX}
    assert record.validity == [UNCALIBRATED] and not fails(record)
    assert record.backend["asked"] == "url" and record.backend["server"] == "vllm"
    assert record.engine["requests"]["prompts"] == "token ids"
    assert record.target["usage"]["completion_tokens"] == 60
    assert record.target["client"]["most_streams"] == 3
    assert record.target["server_metrics"]["over_the_run"]["generation_tokens"] == 0
    assert record.energy["joules_per_output_token"] is None
    assert len(server.bodies) == 14, "two of them the warm-up's"
    assert verify(directory) == []
    assert "synthetic on small" in render_report([directory])
    frame = directory.read_requests()
    assert frame["usage_tokens"].tolist() == [5] * 14


def test_the_highest_load_of_a_server_is_found(tmp_path: Path) -> None:
    """It answers one request after the other, each in 0.2 s: one at once holds 0.3 s, two do not. Client
    processes are started for every probe, and what is known of the server is asked once."""
    places = asyncio.Semaphore(1)

    async def in_turn(exchange: Exchange) -> None:
        async with places:
            await asyncio.sleep(0.2)
            await exchange.whole()

    asked = {"find_load": True, "slo": {"e2e_p50": 0.3}, "concurrency": 1, "num_requests": 16, "warmup": 0}
    with FaultyServer(in_turn) as server:
        given = LOAD | {"url": server.url, "out": tmp_path / "search", "calibrate_client": False} | asked
        found = find_load(run_options(given), Observer(), UrlSubject)
    assert found.code == 0
    assert [(probe.load, probe.verdict) for probe in found.search.probes] == [(1, "holds"), (2, "fails")]
    assert len(server.bodies) == 32
    assert examine_experiment(tmp_path / "search").problems == ()
    for listed in read_experiment(tmp_path / "search").runs:
        record = read_experiment(tmp_path / "search").directory(listed).read_record()
        assert record.correctness == {"passed": None, "reason": BLACK_BOX}
        assert record.target["usage"]["completion_tokens"] == 16 * 5


def test_a_chat_is_asked_in_text_and_the_server_says_what_it_counted(tmp_path: Path) -> None:
    async def chat(exchange: Exchange) -> None:
        await exchange.begin()
        for number in range(exchange.body["max_tokens"]):
            delta = {"role": "assistant", "content": ""} if number == 0 else {"content": " a"}
            choice = {"index": 0, "delta": delta | {"reasoning_content": "b"}, "finish_reason": None}
            await exchange.send(event(None, choices=[choice]))
        await exchange.send(event(None, **usage(5, prompt=21)) + b"data: [DONE]\n\n")
        await exchange.end()

    with FaultyServer(chat, owned_by="tensorrt_llm") as server:
        record = run(server, tmp_path / "run", api="chat", tokenizer=TOKENIZER, max_len=256)
    assert all(each["messages"][0]["role"] == "user" for each in server.bodies)
    assert all("POST /v1/chat/completions" in head for head in server.heads)
    assert record.engine["requests"]["prompts"] == "text"
    assert record.target["usage"]["prompt_tokens"] == 12 * 21, "with the template's own"
    assert record.metrics["output_tokens"] == 60
    assert record.metrics["counts"]["completed"] == 12


def test_the_total_stands_in_where_chunks_do_not_say_their_tokens(tmp_path: Path) -> None:
    """TPOT and the whole run's throughput need only the total; gaps between tokens stay unknown."""

    async def merged(exchange: Exchange) -> None:
        await exchange.begin()
        for _ in range(2):
            await exchange.send(event(" a b"))
            await asyncio.sleep(0.03)
        await exchange.send(event(None, **usage(5)) + b"data: [DONE]\n\n")
        await exchange.end()

    with FaultyServer(merged, owned_by="tensorrt_llm") as server:
        record = run(server, tmp_path / "run")
    assert record.metrics["output_tokens"] == 60
    assert record.metrics["counts"]["wrong_length"] == 0
    assert 0.03 / 4 <= record.metrics["tpot_s"]["p50"]["value"] < 0.03
    assert record.metrics["itl_s"]["requests_without_counts"] == 12
    assert record.metrics["icl_s"]["p50"]["value"] >= 0.03
    assert verify(RunDirectory.open(tmp_path / "run")) == []


def test_a_server_that_counts_nothing_is_not_believed_to_give_what_was_asked(tmp_path: Path) -> None:
    async def silent(exchange: Exchange) -> None:
        await exchange.begin()
        await exchange.send(event(" a") + b"data: [DONE]\n\n")
        await exchange.end()

    with FaultyServer(silent) as server:
        record = run(server, tmp_path / "run")
    assert record.metrics["output_tokens"] is None
    assert record.metrics["tpot_s"]["count"] == 0
    assert record.metrics["counts"]["wrong_length"] == 0, "not known to be wrong either"
    assert any("how many tokens some requests got is not known" in reason for reason in record.validity)
    assert fails(record)


def test_failures_are_counted_with_their_errors(tmp_path: Path) -> None:
    async def fails_often(exchange: Exchange) -> None:
        if len(exchange.server.bodies) % 3 == 0:
            await exchange.status("429 Too Many Requests", b'{"error": {"message": "full"}}')
        else:
            await exchange.whole()

    with FaultyServer(fails_often) as server:
        record = run(server, tmp_path / "run", warmup=0)
    assert record.metrics["counts"]["failed"] == 4
    assert record.target["errors"] == {"HTTP 429: full": 4}
    assert "4 requests failed" in record.validity and fails(record)
    frame = RunDirectory.open(tmp_path / "run").read_requests()
    assert frame["error"].dropna().unique().tolist() == ["HTTP 429: full"]


def test_a_server_killed_in_mid_run_leaves_a_record(tmp_path: Path) -> None:
    async def dies(exchange: Exchange) -> None:
        if len(exchange.server.bodies) == 7:
            exchange.server.kill_now()
        await exchange.whole()

    with FaultyServer(dies) as server:
        record = run(server, tmp_path / "run", warmup=0)
    counts = record.metrics["counts"]
    assert record.run["status"] == "complete", "the client did what it was asked"
    assert counts["completed"] + counts["failed"] == 12 and counts["failed"] >= 6
    assert set(record.target["errors"]) <= {
        "no connection: Connection refused",
        "the connection ended in the middle of the answer",
        "the server closed the connection before it answered",
        "connection lost: Connection reset by peer",
        "connection lost: Broken pipe",
        "connection lost",
    }
    assert "could not be read" in record.target["server_metrics"]["reason"]
    assert verify(RunDirectory.open(tmp_path / "run")) == []


def test_a_run_killed_itself_is_recovered_with_the_servers_counts(tmp_path: Path) -> None:
    """SIGKILL of the bench: the log alone remains. Here it is left as a kill leaves it."""
    kept: list[RunLog] = []

    def keep(log: RunLog) -> None:
        kept.append(log)
        log._file.close()

    with FaultyServer(right) as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLog, "release", keep)
        patch.setattr(experiment, "tabulate", lambda measured: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(server, tmp_path / "run")
    record = recover(tmp_path / "run")
    assert record.metrics["counts"]["completed"] == 12
    assert record.metrics["output_tokens"] == 60
    assert RunDirectory.open(tmp_path / "run").read_requests()["usage_tokens"].tolist() == [5] * 14


def test_the_clients_cost_is_in_the_record_and_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []

    def calibrated(load: calibration.Load, *rest: Any) -> dict[str, Any]:
        loads.append(load)
        late = {"p50": 1e-3, "p99": 0.06, "max": 0.1} if len(loads) == 4 else CALIBRATED["added_token_s"]
        return CALIBRATED | {"added_token_s": late}

    monkeypatch.setattr(calibration, "calibrate", calibrated)
    monkeypatch.setattr(calibration, "allowed_late_s", lambda itl_s: 0.05)  # of a busy machine
    with FaultyServer(right) as server:
        first = run(server, tmp_path / "first", calibrate_client=True)
        second = run(server, tmp_path / "second", calibrate_client=True)
    assert first.validity == []
    assert (
        first.target["client"]["calibration_before"]
        == first.target["client"]["calibration_after"]
        == CALIBRATED
    )
    assert loads[1].streams == 3 and loads[1].chunks_per_s > 0, "the load of the run"
    assert [reason.startswith(BEYOND) for reason in second.validity] == [True]
    assert fails(second)
    assert verify(RunDirectory.open(tmp_path / "second")) == []


def test_a_client_that_was_busy_or_late_in_the_run() -> None:
    calm = {"busy": 0.3, "loop_late_s": {"p99": 0.001}}
    assert beyond_in_the_run(calm, CALIBRATED) == []
    (busy,) = beyond_in_the_run(calm | {"busy": 0.93}, CALIBRATED)
    assert "busy for 93% of the run" in busy and "--client-processes" in busy
    (late,) = beyond_in_the_run(calm | {"loop_late_s": {"p99": 0.0123}}, CALIBRATED)
    assert "12.3 ms late" in late


def test_how_many_processes() -> None:
    cases = {(1, 1): 1, (64, 16): 1, (2000, 2): 1, (2000, 16): 2, (9000, 8): 4}
    assert {case: default_processes(*case) for case in cases} == cases
    requests = tuple(Request(i, i * 10, (1,), 1) for i in range(500))
    assert expected_streams(Workload("w", requests)) == 64
    assert expected_streams(Workload("w", requests, concurrency=300)) == 300
    at_once = tuple(Request(i, 0, (1,), 1) for i in range(500))
    assert expected_streams(Workload("w", at_once)) == 500
