"""GuideLLM's JSON report: one run a benchmark in it, from its requests' own times where it kept them all."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from backbench.reports.importing.foreign import (
    LENGTHS,
    NO_ARRIVALS,
    SAMPLED,
    UNTIMED,
    Foreign,
    ForeignRequest,
    latencies,
    number,
    positive,
    text,
    whole,
)
from backbench.reports.importing.format import Documents, Import

TOOL = "GuideLLM"
TIMED = ("constant", "poisson", "async", "replay")
"""Strategies that have a time for each request before it is sent."""
PLACES = {"time_to_first_token_ms": "ttft_sent_s", "inter_token_latency_ms": "tpot_s"}
"""Its names -> ours: its inter-token latency is a request's mean, which is our TPOT; its time per output
token has the first token's wait in it, and is not taken."""
SENT = "the file's latencies count from sending"


def recognises(document: dict[str, Any]) -> bool:
    benchmarks = document.get("benchmarks")
    return isinstance(benchmarks, list) and all(
        isinstance(each, dict) and isinstance(each.get("metrics"), dict) for each in benchmarks
    )


def read(path: Path, documents: Documents) -> list[Foreign]:
    """A run a benchmark: a sweep holds many."""
    return [_run(document, each) for document in documents for each in document["benchmarks"]]


def _run(document: dict[str, Any], data: dict[str, Any]) -> Foreign:
    config = data.get("config") or data.get("args") or {}
    strategy = config.get("strategy") or {}
    kind = text(strategy.get("kind")) or text(strategy.get("type_")) or "unknown"
    rate = positive(strategy.get("rate")) if kind in TIMED else None
    concurrency = whole(strategy.get("streams")) or whole(strategy.get("max_concurrency"))
    spec = (document.get("config") or {}).get("spec") or {}  # of reports of version 2
    backend = spec.get("backend") or config.get("backend") or {}
    args = document.get("args") or {}
    found = Foreign(
        tool=TOOL,
        model=text(backend.get("model")) or text(args.get("model")) or _model(data),
        backend=text(backend.get("type_")) or text(backend.get("kind")) or text(args.get("backend")),
        workload=f"{TOOL} {kind}",
        utc=_utc(data.get("start_time")),
        duration_s=positive(data.get("duration")),
        concurrency=1 if kind == "synchronous" else None if rate is not None else concurrency or None,
        rate=rate,
    )
    requests = data.get("requests") or {}
    rows = _rows(requests, intended=kind in TIMED)
    total = whole((data["metrics"].get("request_totals") or {}).get("successful"))
    kept = len(requests.get("successful") or ())
    if rows is None or (total is not None and total > kept):
        why = [SAMPLED.format(kept=kept, all=total)] if rows is not None else []
        waits = found.mode == "open"
        return replace(found, notes=(*why, SENT), summary=_summary(data, waits))
    arrivals = [NO_ARRIVALS] if found.mode == "open" and any(each.intended_s is None for each in rows) else []
    return replace(found, requests=tuple(rows), token_times=False, notes=(*arrivals, LENGTHS, UNTIMED))


def _rows(requests: dict[str, Any], intended: bool) -> list[ForeignRequest] | None:
    """The requests of every status; None where one lacks what our numbers need."""
    found = []
    for status in ("successful", "incomplete", "errored"):
        for data in requests.get(status) or ():
            row = _request(data, status, intended)
            if row is None and status == "successful":
                return None
            found += [row] if row is not None else []
    return found or None


def _request(data: dict[str, Any], status: str, intended: bool) -> ForeignRequest | None:
    timings = (data.get("info") or {}).get("timings") or {}

    def at(*names: str) -> float | None:
        places = [timings.get(name) for name in names] + [data.get(name) for name in names]
        return next((number(each) for each in places if number(each) is not None), None)

    sent_s = at("request_start", "request_start_time", "start_time")
    first_s = at("first_token_iteration", "first_token_time")
    last_s = at("last_token_iteration", "last_token_time", "request_end", "request_end_time", "end_time")
    prompt = whole(data.get("prompt_tokens")) or whole((data.get("input_metrics") or {}).get("total_tokens"))
    output = whole(data.get("output_tokens")) or whole((data.get("output_metrics") or {}).get("total_tokens"))
    if sent_s is None:
        return None
    due_s = at("targeted_start") if intended else None
    if status == "errored":
        return ForeignRequest(sent_s, prompt or 0, intended_s=due_s, error="errored")
    if status == "incomplete":  # in flight when the time was over
        return ForeignRequest(sent_s, prompt or 0, intended_s=due_s, finished=False)
    if first_s is None or last_s is None or not output or prompt is None:
        return None
    if output == 1:
        return ForeignRequest(sent_s, prompt, (first_s,), (1,), intended_s=due_s)
    return ForeignRequest(sent_s, prompt, (first_s, last_s), (1, output - 1), intended_s=due_s)


def _summary(data: dict[str, Any], waits: bool) -> dict[str, float]:
    metrics = data["metrics"]

    def block(name: str) -> dict[str, Any]:
        return ((metrics.get(name) or {}).get("successful")) or {}

    def statistics(name: str, factor: float = 1.0) -> dict[str, Any]:
        told = block(name)
        percentiles = told.get("percentiles") or {}
        values = {"mean": told.get("mean"), "p50": told.get("median")}
        values |= {each: percentiles.get(each) for each in ("p90", "p95", "p99")}
        return {
            each: found * factor for each, value in values.items() if (found := number(value)) is not None
        }

    found = latencies(PLACES, {name: statistics(name) for name in PLACES})
    if not waits:
        theirs = {"ttft": statistics("time_to_first_token_ms"), "e2e": statistics("request_latency", 1e3)}
        found |= latencies({"ttft": "ttft_s", "e2e": "e2e_s"}, theirs)
    totals = metrics.get("request_totals") or {}
    counts = {each: whole(totals.get(each)) or 0 for each in ("successful", "incomplete", "errored")}
    told = {
        "output_tokens_per_s.whole_run": block("output_tokens_per_second").get("mean"),
        "requests_per_s": block("requests_per_second").get("mean"),
        "counts.intended": sum(counts.values()),
        "counts.sent": sum(counts.values()),
        "counts.completed": counts["successful"],
        "counts.failed": counts["errored"] + counts["incomplete"],
        "prompt_tokens": block("prompt_token_count").get("total_sum"),
        "output_tokens": block("output_token_count").get("total_sum"),
    }
    return found | {name: at for name, value in told.items() if (at := number(value)) is not None}


def _model(data: dict[str, Any]) -> str | None:
    worker = data.get("worker") or {}
    return text(worker.get("backend_model")) or text((data.get("benchmarker") or {}).get("model"))


def _utc(start_s: Any) -> str | None:
    try:
        return datetime.fromtimestamp(start_s, UTC).isoformat(timespec="seconds")
    except (TypeError, ValueError, OverflowError, OSError):
        return None


IMPORT = Import("guidellm", "GuideLLM's JSON report, one run a benchmark in it.", recognises, read)
