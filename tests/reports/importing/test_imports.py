"""Other tools' files as runs: the same requests give the same numbers whichever tool wrote them down."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backbench.errors import ReportError
from backbench.harness.cli import bench
from backbench.reports.arms import open_arms
from backbench.reports.export.vllm import write as export_vllm
from backbench.reports.importing.format import import_file, imports
from backbench.reports.page.export import write_report
from backbench.reports.record import RunDirectory
from backbench.reports.verify import examine

REQUESTS = 80
EPOCH_S = 1_762_551_534.0


def sent(i: int) -> float:
    return 0.1 * i


def ttft(i: int) -> float:
    return 0.05 + 0.001 * i


def gaps(i: int) -> list[float]:
    return [0.010 + 0.0001 * ((i + j) % 7) for j in range(4 + i % 3)]


def tokens(i: int) -> int:
    return 1 + len(gaps(i))


def fails(i: int) -> bool:
    return i == 7


def vllm(detailed: bool = True, starts: bool = True, **more: Any) -> dict[str, Any]:
    """As vllm/benchmarks/serve.py writes it."""
    ids = range(REQUESTS)
    found: dict[str, Any] = {
        "date": "20260131-235959", "backend": "openai", "label": None, "model_id": "Qwen/Qwen3-0.6B",
        "tokenizer_id": "Qwen/Qwen3-0.6B", "num_prompts": REQUESTS, "request_rate": "inf", "burstiness": 1.0,
        "max_concurrency": 4, "duration": 8.0, "completed": REQUESTS - 1, "failed": 1,
        "total_input_tokens": 790, "total_output_tokens": 474, "request_throughput": 9.875,
        "request_goodput": None, "output_throughput": 59.25, "total_token_throughput": 158.0,
        "mean_ttft_ms": 89.9, "median_ttft_ms": 90.0, "std_ttft_ms": 23.0, "p99_ttft_ms": 128.2,
        "mean_tpot_ms": 10.3, "median_tpot_ms": 10.25, "std_tpot_ms": 0.1, "p99_tpot_ms": 10.5,
        "mean_itl_ms": 10.3, "median_itl_ms": 10.3, "std_itl_ms": 0.2, "p99_itl_ms": 10.6,
        "mean_e2el_ms": 141.0, "median_e2el_ms": 141.5, "std_e2el_ms": 24.0, "p99_e2el_ms": 190.0,
    }  # fmt: skip
    if detailed:
        found |= {
            "input_lens": [10] * REQUESTS,
            "output_lens": [0 if fails(i) else tokens(i) for i in ids],
            "ttfts": [0.0 if fails(i) else ttft(i) for i in ids],
            "itls": [[] if fails(i) else gaps(i) for i in ids],
            "generated_texts": ["…"] * REQUESTS,
            "errors": ["Connection reset" if fails(i) else "" for i in ids],
        }
        found |= {"start_times": [1000.0 + sent(i) for i in ids]} if starts else {}
    return found | more


def aiperf() -> list[dict[str, Any]]:
    """profile_export.jsonl: a warm-up request, then one a line."""
    rows = []
    for i in range(-1, REQUESTS):
        start_ns = round((EPOCH_S + sent(i)) * 1e9)
        took_s = ttft(i) + sum(gaps(i))
        value = {"output_sequence_length": tokens(i), "input_sequence_length": 10}
        value |= {"time_to_first_token": 1e3 * ttft(i), "request_latency": 1e3 * took_s}
        value |= {"inter_chunk_latency": [1e3 * gap for gap in gaps(i)], "inter_token_latency": 10.3}
        rows.append(
            {
                "metadata": {
                    "session_num": i, "x_request_id": f"{i}", "conversation_id": None, "turn_index": 0,
                    "request_start_ns": start_ns, "request_ack_ns": start_ns + 1000,
                    "request_end_ns": start_ns + round(took_s * 1e9), "worker_id": "worker_1",
                    "benchmark_phase": "warmup" if i < 0 else "profiling", "was_cancelled": False,
                },
                "metrics": {name: {"value": each} for name, each in value.items() if not fails(i)},
                "error": {"error_type": "TimeoutError", "error_message": ""} if fails(i) else None,
            }
        )  # fmt: skip
    return rows


def statistics(scale: float) -> dict[str, float]:
    return {
        "avg": 90.0 * scale,
        "p50": 90.0 * scale,
        "p90": 120.0 * scale,
        "p95": 125.0 * scale,
        "p99": 128.0 * scale,
    }


def aiperf_summary() -> dict[str, Any]:
    return {
        "request_throughput": {"unit": "requests/sec", "avg": 9.9},
        "request_count": {"unit": "requests", "avg": 79.0},
        "error_request_count": {"unit": "requests", "avg": 1.0},
        "output_token_throughput": {"unit": "tokens/sec", "avg": 60.0},
        "benchmark_duration": {"unit": "sec", "avg": 8.0},
        "time_to_first_token": {"unit": "ms", **statistics(1)},
        "inter_token_latency": {"unit": "ms", **statistics(0.1)},
        "request_latency": {"unit": "ms", **statistics(2)},
        "input_config": {
            "endpoint": {"model_names": ["Qwen/Qwen3-0.6B"], "type": "chat", "url": "localhost:8000"},
            "loadgen": {"concurrency": 4, "arrival_pattern": "concurrency_burst", "request_count": REQUESTS},
        },
        "start_time": "2026-01-31T23:07:32.596754",
    }


def guidellm(kind: str = "concurrent", total: int = REQUESTS - 1, **strategy: Any) -> dict[str, Any]:
    """A report of one benchmark, in which requests 78 and 79 did not come to their end."""

    def request(i: int) -> dict[str, Any]:
        start_s = EPOCH_S + sent(i)
        timings = {"request_start": start_s, "targeted_start": start_s - 0.02, "token_iterations": tokens(i)}
        timings |= {
            "first_token_iteration": start_s + ttft(i),
            "request_end": start_s + ttft(i) + sum(gaps(i)),
        }
        timings |= {"last_token_iteration": start_s + ttft(i) + sum(gaps(i)), "resolve_end": start_s + 9}
        return {
            "type_": "generative_request_stats", "request_id": f"{i}", "info": {"timings": timings},
            "input_metrics": {"text_tokens": 10, "total_tokens": 10},
            "output_metrics": {"total_tokens": tokens(i)}, "prompt_tokens": 10, "output_tokens": tokens(i),
        }  # fmt: skip

    rows = {
        "successful": [request(i) for i in range(REQUESTS) if not fails(i) and i < 78],
        "incomplete": [request(i) for i in (78, 79)],
        "errored": [request(7)],
    }
    latency = {"mean": 0.14, "median": 0.14}
    block = {"mean": 90.0, "median": 90.0, "percentiles": {"p90": 120.0, "p95": 125.0, "p99": 128.0}}
    return {
        "metadata": {"version": 1, "guidellm_version": "0.8.1"},
        "args": {"model": "Qwen/Qwen3-0.6B", "backend": "openai_http"},
        "benchmarks": [
            {
                "type_": "generative_benchmark",
                "config": {"strategy": {"type_": kind, "streams": 4, **strategy}},
                "start_time": EPOCH_S, "duration": 8.0,
                "requests": rows,
                "metrics": {
                    "request_totals": {"successful": total - 2, "incomplete": 2, "errored": 1},
                    "time_to_first_token_ms": {"successful": block},
                    "inter_token_latency_ms": {"successful": block},
                    "request_latency": {"successful": latency},
                    "output_tokens_per_second": {"successful": {"mean": 60.0}},
                    "requests_per_second": {"successful": {"mean": 9.9}},
                },
            }
        ],
    }  # fmt: skip


def imported(path: Path, content: Any, name: str = "result.json") -> Any:
    """The record of the only run."""
    file = path / name
    lines = isinstance(content, list)
    file.write_text("\n".join(map(json.dumps, content)) if lines else json.dumps(content), encoding="utf-8")
    ((directory, record),) = import_file(file, path / f"out-{name}")
    assert directory.read_record().to_json() == record.to_json()
    return record


def median(values: list[float]) -> float:
    """With the failed request at infinity."""
    ordered = sorted(values) + [math.inf] * (REQUESTS - len(values))
    return (ordered[REQUESTS // 2 - 1] + ordered[REQUESTS // 2]) / 2


GOOD = [i for i in range(REQUESTS) if not fails(i)]


@pytest.mark.parametrize("tool", ["vllm", "aiperf", "guidellm"])
def test_rows_give_our_numbers(tmp_path: Path, tool: str) -> None:
    content: Any = {"vllm": vllm, "aiperf": aiperf, "guidellm": guidellm}[tool]()
    if tool == "aiperf":
        (tmp_path / "profile_export_aiperf.json").write_text(json.dumps(aiperf_summary()))
    record = imported(tmp_path, content)
    metrics = record.metrics
    good = [i for i in GOOD if tool != "guidellm" or i < 78]
    assert metrics["counts"]["intended"] == REQUESTS and metrics["counts"]["failed"] == 1
    assert metrics["counts"]["completed"] == len(good)
    assert metrics["output_tokens"] == sum(map(tokens, good))
    assert metrics["ttft_s"]["p50"]["value"] == pytest.approx(median([ttft(i) for i in good]), abs=1e-6)
    tpots = [sum(gaps(i)) / len(gaps(i)) for i in good]
    assert metrics["tpot_s"]["p50"]["value"] == pytest.approx(median(tpots), abs=1e-6)
    e2e = [ttft(i) + sum(gaps(i)) for i in good]
    assert metrics["e2e_s"]["mean"] == pytest.approx(sum(e2e) / len(e2e), abs=1e-6)
    end_s = max(sent(i) + ttft(i) + sum(gaps(i)) for i in good)
    rate = sum(map(tokens, good)) / end_s
    assert metrics["output_tokens_per_s"]["whole_run"] == pytest.approx(rate, rel=0.05)
    assert metrics["context"]["concurrency"] == 4 and record.model["name"] == "Qwen/Qwen3-0.6B"
    assert (metrics["itl_s"]["count"] == 0) == (tool == "guidellm"), "GuideLLM keeps no token's own time"


@pytest.mark.parametrize("tool", ["vllm", "aiperf", "guidellm"])
@pytest.mark.parametrize("rows", [True, False], ids=["rows", "summary"])
def test_it_says_that_it_is_foreign_wherever_it_is_shown(tmp_path: Path, tool: str, rows: bool) -> None:
    content: Any = {
        "vllm": lambda: vllm(detailed=rows),
        "aiperf": aiperf if rows else aiperf_summary,
        "guidellm": lambda: guidellm(total=REQUESTS if rows is False else REQUESTS - 1),
    }[tool]()
    record = imported(tmp_path, content)
    out = tmp_path / "out-result.json"
    assert record.run["imported"]["rows"] is rows
    assert record.validity[0].startswith("foreign, unverified: imported from ")
    found = examine(RunDirectory.open(out))
    assert found.problems == ()
    assert any("own summary" in line for line in found.unchecked) == (not rows)
    for command in (["show", out], ["compare", out, out, "--json"], ["list", tmp_path]):
        done = CliRunner().invoke(bench, [str(each) for each in command])
        assert done.exit_code in (0, 4), done.output
        assert done.exception is None or isinstance(done.exception, SystemExit)
        if command[0] == "show":
            assert "foreign, unverified" in done.output
    write_report([out], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "foreign, unverified: imported from" in page


def test_a_summary_alone_gives_its_numbers_where_they_mean_the_same(tmp_path: Path) -> None:
    metrics = imported(tmp_path, vllm(detailed=False)).metrics
    assert metrics["ttft_s"]["p50"]["value"] == metrics["ttft_sent_s"]["p50"]["value"] == pytest.approx(0.090)
    assert metrics["tpot_s"]["p99"]["value"] == pytest.approx(0.0105)
    assert metrics["itl_s"]["p50"]["value"] is None and metrics["icl_s"]["p50"]["value"] == pytest.approx(
        0.0103
    )
    assert metrics["output_tokens_per_s"]["whole_run"] == 59.25
    assert metrics["counts"] == metrics["counts"] | {"intended": 80, "completed": 79, "failed": 1}
    assert metrics["ttft_s"]["p95"]["value"] is None, "the file has no p95"
    assert metrics["ttft_s"]["p50"]["low"] is None


def test_an_open_loop_without_intended_times_is_named(tmp_path: Path) -> None:
    """A wait in the client before sending is in none of vLLM's numbers: they are no TTFT of ours."""
    summary = imported(tmp_path, vllm(detailed=False, max_concurrency=None, request_rate=10.0), "s.json")
    assert summary.metrics["ttft_s"]["p50"]["value"] is None
    assert summary.metrics["ttft_sent_s"]["p50"]["value"] == pytest.approx(0.090)
    rows = imported(tmp_path, vllm(max_concurrency=None, request_rate=10.0), "r.json")
    assert rows.metrics["context"]["mode"] == "open"
    assert any("no intended times" in note for note in rows.run["imported"]["notes"])


def test_guidellms_targeted_start_is_the_intended_time(tmp_path: Path) -> None:
    record = imported(tmp_path, guidellm("constant", rate=10.0))
    good = [ttft(i) + 0.02 for i in GOOD if i < 78]
    assert record.metrics["ttft_s"]["p50"]["value"] == pytest.approx(median(good), abs=1e-6)
    assert record.metrics["ttft_sent_s"]["p50"]["value"] == pytest.approx(median(good) - 0.02, abs=1e-6)
    assert record.schedule["lag_s"]["p50"]["value"] == pytest.approx(0.02, abs=1e-6)


def test_a_report_of_guidellms_second_version_without_rows(tmp_path: Path) -> None:
    content = guidellm()
    benchmark = content["benchmarks"][0]
    del benchmark["requests"], content["args"]
    benchmark["config"] = {"strategy": {"kind": "concurrent", "streams": 2}}
    content["config"] = {"spec": {"backend": {"kind": "openai_http", "model": "Qwen/Qwen3-0.6B"}}}
    record = imported(tmp_path, content)
    assert (record.model["name"], record.backend["asked"]) == ("Qwen/Qwen3-0.6B", "openai_http")
    assert record.metrics["context"]["concurrency"] == 2
    assert record.metrics["tpot_s"]["p99"]["value"] == pytest.approx(0.128)
    assert record.run["imported"]["notes"] == ["the file's latencies count from sending"]


def test_older_rows_without_start_times_give_no_rates(tmp_path: Path) -> None:
    record = imported(tmp_path, vllm(starts=False))
    assert record.run["imported"]["rows"] is False
    assert "no start times" in record.run["imported"]["notes"][0]
    together = imported(tmp_path, vllm(starts=False, max_concurrency=None), "together.json")
    assert together.run["imported"]["rows"] is True and together.metrics["context"]["mode"] == "all_at_once"


def test_several_tokens_a_chunk_leave_first_and_last(tmp_path: Path) -> None:
    content = vllm()
    content["output_lens"] = [2 * each for each in content["output_lens"]]
    record = imported(tmp_path, content)
    assert record.metrics["itl_s"]["count"] == 0
    assert record.metrics["output_tokens_per_s"]["steady_state"] is None
    tpots = [sum(gaps(i)) / (2 * tokens(i) - 1) for i in GOOD]
    assert record.metrics["tpot_s"]["p50"]["value"] == pytest.approx(median(tpots), abs=1e-6)


def test_our_own_export_comes_back(tmp_path: Path, cpu_run: RunDirectory) -> None:
    exported = export_vllm(open_arms([cpu_run.path]))[""]
    before = cpu_run.read_record().metrics
    exported = json.loads(json.dumps(exported, default=float))
    after = imported(tmp_path, exported).metrics
    for name in ("ttft_sent_s", "tpot_s", "itl_s"):
        assert after[name]["mean"] == pytest.approx(before[name]["mean"], rel=1e-6)
    assert after["output_tokens"] == before["output_tokens"]


def test_a_sweep_gives_a_run_a_benchmark(tmp_path: Path) -> None:
    content = guidellm()
    content["benchmarks"] *= 2
    (tmp_path / "r.json").write_text(json.dumps(content))
    done = CliRunner().invoke(
        bench, ["import", str(tmp_path / "r.json"), "-o", str(tmp_path / "out"), "--json"]
    )
    assert done.exit_code == 0, done.output
    assert [Path(each["directory"]).name for each in json.loads(done.output)] == ["1", "2"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no JSON"),
        (b"[]", "no JSON object"),
        (b"\xff\xfe", "no UTF-8"),
        (b"3", "no JSON object"),
        (b'{"a": 1}', "no format that is known here \\(aiperf, guidellm, vllm\\)"),
        (json.dumps(vllm()).encode()[:-20], "line 1"),
        (json.dumps(vllm(itls=3)).encode(), ""),
        (json.dumps(vllm(ttfts=["x"] * REQUESTS)).encode(), "not as vllm writes it"),
        (json.dumps(vllm(errors=[])).encode(), "not as vllm writes it"),
    ],
)
def test_what_is_no_such_file_is_said_in_one_line(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "f.json").write_bytes(content)
    if not words:  # rows of no use: the summary
        assert import_file(tmp_path / "f.json", tmp_path / "out")[0][1].run["imported"]["rows"] is False
        return
    with pytest.raises(ReportError, match=words) as error:
        import_file(tmp_path / "f.json", tmp_path / "out")
    assert len(str(error.value)) < 300 and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_byte_order_mark_and_crlf_are_read(tmp_path: Path) -> None:
    text = "\r\n".join(map(json.dumps, aiperf()))
    (tmp_path / "profile_export.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    ((_, record),) = import_file(tmp_path / "profile_export.jsonl", tmp_path / "out")
    assert record.metrics["counts"]["completed"] == REQUESTS - 1
    assert any("neither the model nor the load" in note for note in record.run["imported"]["notes"])


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=3),
    st.just([]),
    st.just({}),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_odd_values_give_a_named_error_or_a_record(tmp_path: Path, data: st.DataObject) -> None:
    """Any value of a file replaced by any other: one line, or a record that verifies."""
    tool = data.draw(st.sampled_from(["vllm", "aiperf", "guidellm"]))
    content: Any = {"vllm": vllm, "aiperf": aiperf, "guidellm": guidellm}[tool]()
    place: Any = content
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if isinstance(place[key], dict | list) and place[key] and data.draw(st.booleans()):
            place = place[key]
            continue
        place[key] = data.draw(ODD)
        break
    file = tmp_path / "odd.json"
    lines = isinstance(content, list)
    file.write_text("\n".join(map(json.dumps, content)) if lines else json.dumps(content))
    out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
    try:
        found = import_file(file, out)
    except ReportError as error:
        assert "\n" not in str(error)
        return
    for directory, record in found:
        assert directory.read_record().run["uuid"] == record.run["uuid"]
        assert examine(directory).problems == ()


def test_each_format_declares_itself() -> None:
    assert [each.name for each in imports()] == ["aiperf", "guidellm", "vllm"]
