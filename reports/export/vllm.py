"""The JSON of `vllm bench serve --save-result --save-detailed` (vllm/benchmarks/serve.py), of one run.

Its keys have vLLM's definitions, so that its files and this one compare: times count from sending and not
from the intended arrival, failed requests are left out, ITL is the raw gaps between chunks, the spread is the
population's. Our own definitions stay in the record. One rule of ours holds: a percentile that the number of
requests cannot support is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import numpy as np

from backbench.errors import ReportError
from backbench.reports.arms import Arm
from backbench.reports.export.format import Export
from backbench.reports.metrics.requests import Context, Requests
from backbench.reports.metrics.run import RunTables
from backbench.reports.metrics.statistics import LEVELS, interval_ranks


def write(arms: Sequence[Arm]) -> dict[str, Any]:
    """The only run's flat object: what ran, totals, rates, statistics in ms, and lists a request each."""
    runs = [run for arm in arms for run in arm.runs]
    if len(runs) != 1:
        raise ReportError(f"A file of vLLM holds one run, and these are {len(runs)}; export them one by one.")
    record, directory = runs[0].record, runs[0].directory
    assert directory is not None
    context = Context.from_dict(record.metrics.get("context") or {})
    tables = RunTables.read(directory.read_requests(), directory.read_steps(), context)
    rows = tables.rows
    if np.isnan(rows.output_tokens).any():
        raise ReportError("The token count of a chunk is unknown, and vLLM's file needs it; nothing written.")
    counts = record.metrics.get("counts") or {}
    offered = record.schedule.get("offered_requests_per_s")
    return {
        "": {
            "date": _date(record.run.get("utc")),
            "endpoint_type": "backbench",
            "backend": arms[0].label,
            "label": None,
            "model_id": record.model.get("name"),
            "tokenizer_id": record.model.get("name"),
            "num_prompts": len(rows),
            "request_rate": "inf" if offered is None else offered,
            "max_concurrency": context.concurrency,
            "completed": int(rows.completed.sum()),
            "failed": len(rows) - int(rows.completed.sum()),
            **_totals(rows, tables.whole.seconds),
            "request_goodput": record.metrics.get("goodput_requests_per_s"),
            **_times(rows),
            "backbench_uuid": record.run.get("uuid"),
            "backbench_unfinished": counts.get("unfinished"),
        }
    }


def _date(utc: object) -> str | None:
    """vLLM's form of a time, 20260131-235959."""
    try:
        return datetime.fromisoformat(str(utc)).strftime("%Y%m%d-%H%M%S")
    except ValueError:
        return None


def _totals(rows: Requests, duration_s: float) -> dict[str, float]:
    done = rows.completed
    prompt, output = float(rows.prompt_tokens[done].sum()), float(rows.output_tokens[done].sum())
    if duration_s <= 0:
        raise ReportError("The run has no length, so that it has no rates; nothing written.")
    return {
        "duration": duration_s,
        "total_input_tokens": int(prompt),
        "total_output_tokens": int(output),
        "request_throughput": int(done.sum()) / duration_s,
        "output_throughput": output / duration_s,
        "total_token_throughput": (prompt + output) / duration_s,
    }


def _times(rows: Requests) -> dict[str, Any]:
    """mean_ttft_ms, ..., and the lists they are of; a failed request's entries are zeros and empty."""
    done, tokens = rows.completed, rows.output_tokens
    ttft_s = np.where(done, (rows.first_ns - rows.sent_ns) / 1e9, 0.0)
    latency_s = np.where(done, (rows.last_ns - rows.sent_ns) / 1e9, 0.0)
    gaps_s: list[Any] = [
        np.diff(times) / 1e9 if ok else [] for times, ok in zip(rows.chunk_ns, done, strict=True)
    ]
    several = done & (tokens > 1)
    samples = {
        "ttft": ttft_s[done],
        "tpot": (latency_s - ttft_s)[several] / (tokens[several] - 1),
        "itl": np.concatenate([*gaps_s, np.empty(0)]),
        "e2el": latency_s[done],
    }
    found: dict[str, Any] = {}
    for name, values_s in samples.items():
        if not len(values_s):
            continue
        ms = values_s * 1e3
        found |= {
            f"mean_{name}_ms": ms.mean(),
            f"median_{name}_ms": np.median(ms),
            f"std_{name}_ms": ms.std(),
        }
        supported = {at: level for at, level in LEVELS.items() if interval_ranks(int(done.sum()), level)}
        found |= {f"{at}_{name}_ms": np.quantile(ms, level) for at, level in supported.items()}
    return found | {
        "input_lens": rows.prompt_tokens.astype(int).tolist(),
        "output_lens": np.where(done, tokens, 0).astype(int).tolist(),
        "ttfts": ttft_s.tolist(),
        "itls": [list(gaps) for gaps in gaps_s],
        "start_times": (np.nan_to_num(rows.sent_ns) / 1e9).tolist(),
        "errors": ["" if ok else "failed" for ok in done],
    }


EXPORT = Export(
    "vllm",
    "One run as `vllm bench serve --save-detailed` writes it, by vLLM's definitions.",
    write,
)
