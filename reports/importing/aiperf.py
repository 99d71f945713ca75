"""AIPerf's profile_export.jsonl (a request a line) or profile_export_aiperf.json (its summary); beside the
former, the latter says the model and the load."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from backbench.errors import ReportError
from backbench.reports.importing.foreign import (
    LENGTHS,
    NO_ARRIVALS,
    UNTIMED,
    Foreign,
    ForeignRequest,
    known,
    latencies,
    number,
    plain,
    positive,
    text,
    whole,
)
from backbench.reports.importing.format import Documents, Import, parse, read_limited

TOOL = "AIPerf"
SUMMARY_FILE = "profile_export_aiperf.json"
PLACES = {
    "time_to_first_token": "ttft_sent_s",
    "inter_token_latency": "tpot_s",
    "inter_chunk_latency": "icl_s",
}
"""Its names -> ours: its ITL is a request's mean gap, which is our TPOT."""
SENT = "the file's latencies count from sending"


def recognises(document: dict[str, Any]) -> bool:
    return _is_row(document) or {"input_config", "request_throughput"} <= document.keys()


def _is_row(document: dict[str, Any]) -> bool:
    metadata = document.get("metadata")
    return isinstance(metadata, dict) and "request_start_ns" in metadata and "metrics" in document


def read(path: Path, documents: Documents) -> list[Foreign]:
    """One run."""
    if not _is_row(documents[0]):
        found = _configured(documents[0])
        waits = found.mode == "open"
        return [replace(found, notes=(SENT,), summary=_summary(documents[0], waits))]
    beside = path.with_name(SUMMARY_FILE)
    config = parse(read_limited(beside), beside)[0] if beside.is_file() else {}
    found = _configured(config)
    rows = [_request(each) for each in documents]
    told = [row for row, _ in rows]
    token_times = all(timed for _, timed in rows)
    known = [] if config else [f"no {SUMMARY_FILE} beside it: neither the model nor the load is known"]
    open_loop = [NO_ARRIVALS] if found.mode == "open" else []
    notes = (*known, *open_loop, LENGTHS, *([] if token_times else [UNTIMED]))
    if not config:  # a load of which nothing is known: each request was sent when it was
        found = replace(found, rate=_rate([row.sent_s for row in told if not row.warmup]))
        notes = (*notes, NO_ARRIVALS)
    return [replace(found, requests=tuple(told), token_times=token_times, notes=notes)]


def _rate(sent_s: list[float]) -> float:
    span_s = max(sent_s, default=0.0) - min(sent_s, default=0.0)
    return (len(sent_s) - 1) / span_s if span_s > 0 else float(len(sent_s))


def _configured(data: dict[str, Any]) -> Foreign:
    config = data.get("input_config") or {}
    endpoint, load = config.get("endpoint") or {}, config.get("loadgen") or {}
    models = endpoint.get("model_names") or [endpoint.get("model") or config.get("model")]
    rate = positive(load.get("request_rate"))
    return Foreign(
        tool=TOOL,
        model=text(models[0]),
        backend=text(endpoint.get("type")),
        workload=TOOL,
        utc=text(data.get("start_time")),
        duration_s=positive(_average(data, "benchmark_duration")),
        concurrency=None if rate is not None else whole(load.get("concurrency")) or None,
        rate=rate,
        settings=plain(load, "arrival_pattern", "request_count"),
    )


def _request(data: dict[str, Any]) -> tuple[ForeignRequest, bool]:
    """The request, and whether each of its tokens' times is known."""
    metadata, metrics = data["metadata"], data.get("metrics") or {}
    sent_s = int(metadata["request_start_ns"]) / 1e9
    facts = {
        "session": text(metadata.get("conversation_id")),
        "warmup": metadata.get("benchmark_phase") == "warmup",
    }
    prompt, output = (
        whole(_value(metrics, "input_sequence_length")),
        whole(_value(metrics, "output_sequence_length")),
    )
    first_ms = number(_value(metrics, "time_to_first_token") or _value(metrics, "ttft"))  # its older name
    if data.get("error") or metadata.get("was_cancelled") or not output or first_ms is None:
        error = data.get("error") or {}
        why = text(error.get("error_type")) or text(error.get("type")) or "cancelled or without output"
        return ForeignRequest(sent_s, prompt or 0, error=why, **facts), True
    if prompt is None:
        raise ReportError("A request of the AIPerf file has no input_sequence_length; nothing is imported.")
    gaps = _value(metrics, "inter_chunk_latency")
    gaps_ms = [known(number(gap)) for gap in gaps] if isinstance(gaps, list) else []
    if len(gaps_ms) + 1 == output:
        times_s = [sent_s + at / 1e3 for at in accumulate([first_ms, *gaps_ms])]
        return ForeignRequest(sent_s, prompt, tuple(times_s), (1,) * output, **facts), True
    end_s = int(metadata["request_end_ns"]) / 1e9
    last_s = sent_s + (first_ms + sum(gaps_ms)) / 1e3 if gaps_ms else end_s
    if output == 1:
        return ForeignRequest(sent_s, prompt, (sent_s + first_ms / 1e3,), (1,), **facts), True
    return ForeignRequest(sent_s, prompt, (sent_s + first_ms / 1e3, last_s), (1, output - 1), **facts), False


def _value(metrics: dict[str, Any], name: str) -> Any:
    return (metrics.get(name) or {}).get("value")


def _average(data: dict[str, Any], name: str) -> float | None:
    block = data.get(name)
    return number(block.get("avg")) if isinstance(block, dict) else None


def _summary(data: dict[str, Any], waits: bool) -> dict[str, float]:
    def statistics(name: str) -> dict[str, Any]:
        block = data.get(name) or {}
        return {"mean": block.get("avg")} | {each: block.get(each) for each in ("p50", "p90", "p95", "p99")}

    found = latencies(PLACES, {name: statistics(name) for name in PLACES})
    if not waits:
        ours = {"time_to_first_token": "ttft_s", "request_latency": "e2e_s"}
        found |= latencies(ours, {name: statistics(name) for name in ours})
    completed, failed = _average(data, "request_count") or 0.0, _average(data, "error_request_count") or 0.0
    told = {
        "output_tokens_per_s.whole_run": _average(data, "output_token_throughput"),
        "total_tokens_per_s.whole_run": _average(data, "total_token_throughput"),
        "requests_per_s": _average(data, "request_throughput"),
        "counts.intended": completed + failed,
        "counts.sent": completed + failed,
        "counts.completed": completed,
        "counts.failed": failed,
        "prompt_tokens": _average(data, "total_isl"),
        "output_tokens": _average(data, "total_osl"),
    }
    return found | {name: value for name, value in told.items() if value is not None}


IMPORT = Import(
    "aiperf", "AIPerf's profile_export.jsonl, or profile_export_aiperf.json alone.", recognises, read
)
