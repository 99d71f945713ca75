"""What is said of a workload before it runs: numbers by hand, and a page that holds them."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest

from backbench.harness.commands.workload_view import histogram_rows, sparkline
from backbench.harness.workload_page import render_workload
from backbench.harness.workload_profile import PACED, TOGETHER, profile
from backbench.workloads.catalogue import make
from backbench.workloads.options import WorkloadOptions
from backbench.workloads.statistics import arrival_counts, histogram


def made(name: str = "synthetic", **options: Any) -> Any:
    return make(name, WorkloadOptions(**({"num_requests": 100} | options)))


def test_numbers_of_a_constant_stream() -> None:
    found = profile(made(rate=4.0, arrival="constant", input_lengths="fixed:64", shared_prefix="1x32"))
    assert found["requests"] == 100
    assert found["prompt_tokens"]["p50"] == found["prompt_tokens"]["maximum"] == 96
    assert found["prompt_tokens"]["histogram"] == [(96, 96, 100)]
    arrivals = found["arrivals"]
    assert arrivals["requests_per_s"] == pytest.approx(4.0)
    assert arrivals["gap_cv"] == 0 and arrivals["longest_gap_s"] == 0.25
    # Windows of 2.5 s hold 10 arrivals each, but for a rounding of the window to whole ns.
    assert arrivals["index_of_dispersion"] == pytest.approx(0, abs=0.05)
    assert sum(arrivals["counts"]) == 100 and len(arrivals["counts"]) == 60
    assert found["schedule_s"] == 99 / 4
    # The shared 32 tokens of 99 of 100 prompts, in blocks of 16.
    assert found["prefix"] == {"block_tokens": 16, "ideal_hit_ratio": pytest.approx(99 * 32 / 9600)}
    assert profile(made(shared_prefix="1x32", input_lengths="fixed:64"), 48)["prefix"]["ideal_hit_ratio"] == 0
    assert found["sessions"] is found["clipped"] is found["parts"] is None
    assert json.loads(json.dumps(found))["name"] == "synthetic"


def test_what_there_is_none_of_says_why() -> None:
    assert profile(made())["untimed"] == PACED
    assert profile(made(all_at_once=True))["untimed"] == TOGETHER
    assert profile(made(all_at_once=True))["arrivals"] is None
    few = profile(made(rate=1.0, num_requests=2))
    assert few["arrivals"]["gap_cv"] is few["arrivals"]["index_of_dispersion"] is None


def test_sessions_clipping_and_parts() -> None:
    turns = profile(made(turns=4))["sessions"]
    assert turns["turns"]["maximum"] == 4
    assert turns["sessions"] * turns["turns"]["mean"] == pytest.approx(100)
    clipped = profile(made("azure-code", max_len=512))["clipped"]
    assert clipped["max_len"] == 512 and clipped["requests"] > 50
    parts = profile(made("mix:sharegpt=0.5,azure-code=0.5"))["parts"]
    assert [part["name"] for part in parts] == ["sharegpt", "azure-code"]
    assert sum(part["requests"] for part in parts) == 100
    assert parts[1]["prompt_tokens"]["mean"] > parts[0]["prompt_tokens"]["mean"]


def test_turns_that_answers_time_are_no_arrivals(tmp_path: Any) -> None:
    first = {"input_length": 64, "output_length": 8, "hash_ids": [0], "group_id": 1}
    rows: list[dict[str, Any]] = [
        first | {"session_id": name, "timestamp": at} for name, at in (("a", 0), ("b", 500))
    ]
    rows.append({"session_id": "a", "input_length": 9, "output_length": 8, "hash_ids": [1], "delay": 3000})
    path = tmp_path / "day.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = profile(make(str(path), WorkloadOptions()))
    assert found["arrivals"]["requests_per_s"] == 2.0 and sum(found["arrivals"]["counts"]) == 2
    # Of 64 + 64 + 81 tokens: four blocks of b's prompt but the last, four of a's answered context.
    assert found["prefix"]["ideal_hit_ratio"] == pytest.approx((48 + 64) / 209)
    path.write_text("".join(json.dumps(row) + "\n" for row in (rows[0], rows[2])))
    assert profile(make(str(path), WorkloadOptions()))["untimed"] == TOGETHER


def test_histograms_hold_every_length_once() -> None:
    for lengths in ([1], [5, 5], [1, 2, 3], list(range(1, 5000, 7)), [1, 100_000]):
        found = histogram(lengths)
        assert sum(count for _, _, count in found) == len(lengths)
        assert found[0][0] == min(lengths) and found[-1][1] == max(lengths)
        assert all(high + 1 == low for (_, high, _), (low, _, _) in pairwise(found))
    assert arrival_counts([0, 1, 10], 10) == (1e-9, [1, 1, 0, 0, 0, 0, 0, 0, 0, 1])
    assert arrival_counts([5, 5]) == (0.0, [2])


def test_bars() -> None:
    assert sparkline([0, 1, 4, 8]) == " ▁▄█"
    assert sparkline([0, 1000, 1]) == " █▁", "a bin that is not empty is seen"
    assert sparkline([0, 0]) == "  "
    assert histogram_rows([(1, 9, 1), (10, 10, 1000)]) == [("1–9", "1", "█"), ("10", "1,000", "█" * 36)]


def test_the_page_holds_the_numbers_and_no_script(tmp_path: Any) -> None:
    path = tmp_path / "<b>trace.csv"
    path.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,10,20\n1.25,30,40\n")
    page = render_workload(make(str(path), WorkloadOptions()), 16)
    assert "&lt;b&gt;trace.csv" in page and "<b>" not in page and "<script" not in page
    assert page.count("<svg xmlns") == 2 and "requests/s 0.8" in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert render_workload(made(), 16).count("<svg xmlns") == 1, "no arrivals to draw"
