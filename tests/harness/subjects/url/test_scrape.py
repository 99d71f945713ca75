"""The server's own metrics: read, named, sampled; and what a record says where they are missing."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backbench.harness.subjects.url.scrape import MOST_SAMPLES, Scraper, ours, parse
from backbench.harness.subjects.url.servers import SERVERS

VLLM = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a{b}"} 3.0
vllm:num_requests_running{engine="1",model_name="x y"} 4.0
vllm:num_requests_waiting{engine="0"} 2
vllm:kv_cache_usage_perc{engine="0"} 0.25
vllm:prefix_cache_queries_total{engine="0"} %d
vllm:prefix_cache_hits_total{engine="0"} %d 1700000000000
vllm:num_preemptions_total 1e1
vllm:spec_decode_num_drafts_total{engine="0"} %d
vllm:spec_decode_num_accepted_tokens_total{engine="0"} %d
vllm:time_to_first_token_seconds_bucket{le="+Inf"} 7
vllm:broken{a="b"} NaN
"""


def vllm(queries: int, hits: int) -> str:
    """A page on which there were half as many drafts as queries, and three times as many accepted tokens."""
    return VLLM % (queries, hits, queries // 2, 3 * (queries // 2))


def test_values_are_summed_over_labels() -> None:
    found = ours(parse(vllm(100, 40)), SERVERS["vllm"])
    assert found["requests_running"] == 7
    assert found["requests_waiting"] == 2
    assert found["kv_cache_usage"] == 0.25
    assert (found["prefix_cache_queries"], found["prefix_cache_hits"]) == (100, 40)
    assert found["preemptions"] == 10
    assert found["generation_tokens"] is None, "missing is not 0"


NAMES = {
    "sglang": ("sglang:num_running_reqs", "sglang:num_queue_reqs", "sglang:token_usage"),
    "llama.cpp": (
        "llamacpp:requests_processing",
        "llamacpp:requests_deferred",
        "llamacpp:kv_cache_usage_ratio",
    ),
    "backbench": (
        "backbench:num_requests_running",
        "backbench:num_requests_waiting",
        "backbench:kv_cache_usage_perc",
    ),
    "vllm": ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:gpu_cache_usage_perc"),
}


@pytest.mark.parametrize("server", NAMES)
def test_each_servers_names(server: str) -> None:
    text = "".join(
        f'{name}{{m="x"}} {value}\n' for name, value in zip(NAMES[server], (7, 2, 0.25), strict=True)
    )
    found = ours(parse(text), SERVERS[server])
    assert [found[name] for name in ("requests_running", "requests_waiting", "kv_cache_usage")] == [
        7,
        2,
        0.25,
    ]


@given(st.text())
def test_any_page_is_read(text: str) -> None:
    assert all(isinstance(value, float) for value in parse(text).values())


def pages(*texts: str | Exception) -> Callable[[], str]:
    left = list(texts)

    def fetch() -> str:
        found = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(found, Exception):
            raise found
        return found

    return fetch


def test_what_grew_and_what_was_sampled() -> None:
    scraper = Scraper(pages(vllm(100, 40), vllm(150, 50), vllm(300, 140)), SERVERS["vllm"], period_s=0.01)
    start_ns = time.perf_counter_ns()
    scraper.start()
    time.sleep(0.1)
    scraper.stop()
    found = scraper.section(start_ns)
    assert found["over_the_run"]["prefix_cache_queries"] == 200
    assert found["over_the_run"]["generation_tokens"] is None
    assert found["prefix_hit_ratio"] == 0.5
    assert (found["over_the_run"]["drafts"], found["over_the_run"]["drafted_tokens"]) == (100, None)
    assert found["mean_acceptance_length"] == 4
    samples = found["samples"]
    assert len(samples["time_ns"]) == len(samples["requests_running"]) >= 2
    assert samples["requests_running"][0] == 7
    assert 0 < samples["time_ns"][0] < samples["time_ns"][-1] < 10**9
    assert "reason" not in found


def test_a_server_without_metrics_costs_nothing_but_a_reason() -> None:
    scraper = Scraper(pages(OSError("404: no such page")), SERVERS["vllm"])
    scraper.start()
    scraper.stop()
    assert "404" in scraper.section(0)["reason"]


def test_metrics_of_another_server_are_said_to_be_unknown() -> None:
    scraper = Scraper(pages("someone:running 3\n"), SERVERS["vllm"])
    scraper.start()
    scraper.stop()
    assert "names no metric" in scraper.section(0)["reason"]


def test_a_server_that_dies_leaves_what_was_sampled() -> None:
    scraper = Scraper(pages(vllm(1, 1), vllm(2, 1), OSError("gone")), SERVERS["vllm"], period_s=0.01)
    scraper.start()
    time.sleep(0.1)
    scraper.stop()
    found = scraper.section(0)
    assert found["over_the_run"]["prefix_cache_queries"] is None
    assert len(found["samples"]["time_ns"]) == 1
    assert "gone" in found["reason"]


def test_a_counter_that_began_anew_grew_by_nobody_knows_what() -> None:
    scraper = Scraper(pages(vllm(100, 40), vllm(7, 2)), SERVERS["vllm"])
    scraper.start()
    scraper.stop()
    assert scraper.section(0)["over_the_run"]["prefix_cache_queries"] is None


def test_a_long_run_keeps_a_bounded_number_of_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    scraper = Scraper(lambda: vllm(1, 1), SERVERS["vllm"], period_s=1.0)
    scraper.start()
    monkeypatch.setattr(scraper._stop, "wait", lambda _: len(waits) > 3 * MOST_SAMPLES or waits.append(1))
    waits: list[int] = []
    scraper._loop()
    assert len(scraper._samples) <= MOST_SAMPLES
    assert scraper._period_s > 1.0
    scraper._stop.set()
