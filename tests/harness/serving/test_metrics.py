"""What /metrics counts, against requests whose counts are known."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from serving_fixtures import PROMPT, Server, parse, serving, tiny_engine

from backbench.engine.async_engine import StepReport
from backbench.engine.request import StepStats, Token
from backbench.harness.serving.metrics import Histogram, ServingMetrics


def test_counts_of_requests_that_were_served() -> None:
    prompt_len = len(tiny_engine().tokenizer.encode(PROMPT))
    tiny_engine().reset_prefix_cache()

    async def main() -> dict[str, float]:
        async with serving(vllm_metrics=True) as server:
            for _ in range(3):
                assert (await server.complete(max_tokens=5, n=2, ignore_eos=True)).status == 200
            reply = await server.call("GET", "/metrics")
            assert reply.headers["content-type"].startswith("text/plain")
            return parse(b"".join(reply.chunks).decode())

    found = asyncio.run(main())
    own = {name.removeprefix("backbench:"): value for name, value in found.items() if name.startswith("b")}
    assert {name.removeprefix("vllm:"): value for name, value in found.items() if name.startswith("v")} == own
    assert own["request_success_total[length]"] == 3 and own["request_success_total[abort]"] == 0
    assert own["prompt_tokens_total"] == own["prefix_cache_queries_total"] == 3 * prompt_len
    assert own["generation_tokens_total"] == 3 * 2 * 5
    assert own["time_to_first_token_seconds_count"] == own["e2e_request_latency_seconds_count"] == 3
    assert own["request_queue_time_seconds_count"] == own["request_prefill_time_seconds_count"] == 3
    assert own["request_time_per_output_token_seconds_count"] == 6
    assert own["inter_token_latency_seconds_count"] == 6 * 4
    assert own["num_requests_running"] == own["kv_cache_usage_perc"] == 0
    parts = [own[f"request_{part}_time_seconds_sum"] for part in ("queue", "prefill", "decode")]
    assert sum(parts) == pytest.approx(own["e2e_request_latency_seconds_sum"], rel=0.02, abs=2e-3)


def step(seen_s: float, tokens: list[Token], started: list[str]) -> StepReport:
    counts = ("step", "start_ns", "end_ns", "host_ns", "num_seqs", "num_prefill_tokens", "num_decodes")
    counts += ("context_tokens", "running", "waiting", "kv_blocks_used", "kv_blocks_total")
    zeros = dict.fromkeys(counts, 0)
    stats = StepStats(**zeros, num_tokens=7, prefix_hit_tokens=2, preemptions=1, graph=False)
    return StepReport(int(seen_s * 1e9), tokens, [stats], started)


def test_tokens_of_one_step_share_the_gap_before_them() -> None:
    metrics = ServingMetrics(tiny_engine(), "tiny")
    metrics.arrived("a", 11, 1, arrived_ns=0)
    metrics.observe(step(0.2, [Token("a", 0, 1)], ["a"]), 250_000_000)
    last = [Token("a", 0, 1)] * 2 + [Token("a", 0, 1, finish_reason="stop")]
    metrics.observe(step(0.5, last, []), 550_000_000)
    metrics.left("a")
    found = {name.removeprefix("backbench:"): value for name, value in parse(metrics.text()).items()}
    assert found["time_to_first_token_seconds_sum"] == pytest.approx(0.25)
    assert found["inter_token_latency_seconds_count"] == 3
    assert found["inter_token_latency_seconds_bucket[0.08]"] == 0
    assert found["inter_token_latency_seconds_bucket[0.1]"] == 3  # 0.3 s / 3, not 0.3 and twice nothing
    assert found["request_time_per_output_token_seconds_sum"] == pytest.approx(0.1)
    assert found["request_decode_time_seconds_sum"] == pytest.approx(0.3)
    assert found["prefix_cache_hits_total"] == 4 and found["num_preemptions_total"] == 2
    assert found["iteration_tokens_total_bucket[4.0]"] == 0
    assert found["iteration_tokens_total_bucket[8.0]"] == 2


def test_a_bound_belongs_to_the_bucket_below_it() -> None:
    histogram = Histogram("h", "help", (1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 9.0):
        histogram.observe(value)
    counts: list[Any] = [(labels.get("le"), value) for _, labels, value in histogram.samples()]
    assert counts == [("1.0", 2), ("2.0", 4), ("+Inf", 5), (None, 14.0), (None, 5)]


def test_refusals_are_counted() -> None:
    async def main() -> None:
        async with serving(max_queue=0) as server:
            assert isinstance(server, Server)
            asked = {"max_tokens": 30, "ignore_eos": True, "n": 5}
            replies = await asyncio.gather(server.complete(**asked), server.complete(**asked))
            assert sorted(reply.status for reply in replies) == [200, 429]
            found = parse(server.front.metrics.text())
            assert found["backbench:request_refused_total"] == 1

    asyncio.run(main())
