"""The JSON of `vllm bench serve --save-result` (vllm/benchmarks/serve.py), with --save-detailed or without;
SGLang's bench_serving writes the same keys."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from typing import Any

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
from backbench.reports.importing.format import Documents, Import

TOOL = "vllm bench serve"
SENT = "the file's TTFT and E2E count from sending"
NO_STARTS = "the requests' rows have no start times or are not whole: the numbers are the summary's"
ROWS = ("input_lens", "output_lens", "ttfts", "itls", "errors")
PLACES = {"ttft": "ttft_sent_s", "tpot": "tpot_s", "itl": "icl_s"}
"""Its names -> what they are here: the gaps it pools are between chunks. TTFT and E2E are ours where nothing
waits before it is sent."""


def recognises(document: dict[str, Any]) -> bool:
    return {"request_throughput", "completed", "total_input_tokens", "duration"} <= document.keys()


def read(path: Path, documents: Documents) -> list[Foreign]:
    """A run an object: --append-result writes several."""
    return [_run(each) for each in documents]


def _run(data: dict[str, Any]) -> Foreign:
    concurrency, rate = whole(data.get("max_concurrency")) or None, positive(data.get("request_rate"))
    offered = Foreign(
        tool=TOOL,
        model=text(data.get("model_id")),
        backend=text(data.get("backend")) or text(data.get("endpoint_type")),
        workload=text(data.get("dataset_name")) or TOOL,
        utc=_utc(data.get("date")),
        duration_s=positive(data.get("duration")),
        concurrency=concurrency,
        rate=None if concurrency is not None else rate,
        settings=plain(data, "burstiness", "tokenizer_id"),
    )
    rows, token_times = _rows(data, at_once=offered.mode == "all_at_once")
    notes = [NO_ARRIVALS] if offered.mode == "open" else []
    if rows is None:
        detailed = isinstance(data.get("ttfts"), list)
        notes = [*([NO_STARTS] if detailed else []), SENT]
        return _with(offered, notes, summary=_summary(data, waits=offered.mode == "open"))
    notes += [LENGTHS, *([] if token_times else [UNTIMED])]
    return _with(offered, notes, requests=tuple(rows), token_times=token_times)


def _with(offered: Foreign, notes: list[str], **more: Any) -> Foreign:
    return replace(offered, notes=tuple(notes), **more)


def _rows(data: dict[str, Any], at_once: bool) -> tuple[list[ForeignRequest] | None, bool]:
    """The requests, and whether each token's time is known; None where the rows do not give rates.

    Older files tell no start times, which are all alike only where everything was sent at once.
    """
    lists = [data.get(name) for name in ROWS]
    starts = data.get("start_times")
    if not isinstance(starts, list) and at_once and isinstance(lists[0], list):
        starts = [0.0] * len(lists[0])
    columns = [each for each in (starts, *lists) if isinstance(each, list)]
    if len(columns) <= len(ROWS):
        return None, True
    rows, token_times = [], True
    for row in zip(*columns, strict=True):
        start, prompt, output, ttft_s, gaps_s, error = row
        sent_s, prompt_tokens = known(number(start)), int(known(whole(prompt)))
        if error or not output:
            rows.append(ForeignRequest(sent_s, prompt_tokens, error=text(error) or "no output"))
            continue
        passed_s = [known(number(each)) for each in (ttft_s, *gaps_s)]
        times = [sent_s + at for at in accumulate(passed_s)]
        counts = [1] * len(times)
        if len(times) != output:  # several tokens came in a chunk, and nobody knows in which
            token_times = False
            times, counts = _first_and_last(times, int(known(whole(output))))
        rows.append(ForeignRequest(sent_s, prompt_tokens, tuple(times), tuple(counts)))
    return rows, token_times


def _first_and_last(times: list[float], output: int) -> tuple[list[float], list[int]]:
    alone = len(times) == 1 or output == 1
    return (times[:1], [output]) if alone else ([times[0], times[-1]], [1, output - 1])


def _summary(data: dict[str, Any], waits: bool) -> dict[str, float]:
    levels = {"mean": "mean", "median": "p50", "p90": "p90", "p95": "p95", "p99": "p99"}

    def statistics(name: str) -> dict[str, Any]:
        return {ours: data.get(f"{theirs}_{name}_ms") for theirs, ours in levels.items()}

    places = dict(PLACES)
    found = latencies(places, {name: statistics(name) for name in places})
    if not waits:
        found |= latencies({"ttft": "ttft_s", "e2el": "e2e_s"}, {n: statistics(n) for n in ("ttft", "e2el")})
    completed, failed = whole(data["completed"]) or 0, whole(data.get("failed")) or 0
    told = {
        "output_tokens_per_s.whole_run": data.get("output_throughput"),
        "total_tokens_per_s.whole_run": data.get("total_token_throughput"),
        "requests_per_s": data.get("request_throughput"),
        "counts.intended": completed + failed,
        "counts.sent": completed + failed,
        "counts.completed": completed,
        "counts.failed": failed,
        "prompt_tokens": data.get("total_input_tokens"),
        "output_tokens": data.get("total_output_tokens"),
    }
    return found | {name: at for name, value in told.items() if (at := number(value)) is not None}


def _utc(date: Any) -> str | None:
    """20260131-235959 in ISO 8601; its time zone is not told, and taken for UTC."""
    try:
        return datetime.strptime(str(date), "%Y%m%d-%H%M%S").replace(tzinfo=UTC).isoformat()
    except ValueError:
        return None


IMPORT = Import("vllm", "`vllm bench serve --save-result`, best with --save-detailed.", recognises, read)
