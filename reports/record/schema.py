"""The run record: the one schema that everything reads and writes."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from backbench.errors import ReportError, printable, shown
from backbench.reports.record.shape import misshapen

SCHEMA_VERSION = 2
"""Raised whenever a field's meaning changes; two records compare only within one version."""
READABLE = (1, 2)
"""1: the request table has no warm-up requests, the telemetry nothing of other processes."""

STATUSES = ("complete", "interrupted", "failed")

RECORD_FILE = "run.json"
REQUESTS_FILE = "requests.parquet"
STEPS_FILE = "steps.parquet"
TELEMETRY_FILE = "telemetry.parquet"
REPORT_FILE = "report.html"
LOG_FILE = "requests.log.jsonl"
"""What a run that is going or was killed has instead of its record."""

ADDED_SECTIONS = ("accuracy", "speculation", "target")
"""Those that older records of the same schema lack; empty there, and then no part of the record's digest."""

REQUEST_COLUMNS: dict[str, str] = {
    "request_id": "int64",
    "session": "string?",
    "intended_ns": "int64",
    "sent_ns": "int64?",
    "first_ns": "int64?",
    "last_ns": "int64?",
    "prompt_tokens": "int64",
    "requested_tokens": "int64",
    "output_tokens": "int64",
    "token_ns": "list<int64>",
    "token_counts": "list<int32>",
    "finished": "bool",
    "error": "string?",
    "warmup": "bool",
    "turn": "int64?",
    "follows": "int64?",
    "think_ns": "int64?",
    "usage_tokens": "int64?",
}
"""One row a request. Times are relative to the run's start; `token_ns` has the time of every chunk and
`token_counts` how many tokens it held (null inside the list when unknown); `usage_tokens` is their sum by a
server that says it. A warm-up request is no measured one, but the tokens it got after the run's start took
measured time. A later turn of a session names the request it `follows`, and is sent `think_ns` after the
answer to that one ended."""

LATER_COLUMNS: dict[str, Any] = dict.fromkeys(
    ("turn", "follows", "think_ns", "usage_tokens", "device_ns", "sampler_cpu_s")
)
"""Columns that older tables of the same schema lack -> what they say by it."""

ADDED_COLUMNS: dict[str, tuple[int, Any]] = {"warmup": (2, False)} | dict.fromkeys(
    (
        "processes",
        "usable_cpus",
        "process_cpu_s",
        "machine_cpu_s",
        "steal_s",
        "cpu_pressure_s",
        "throttled_s",
        "involuntary_switches",
    ),
    (2, None),
)
"""Column -> the schema version that added it, and what older tables say by lacking it."""

STEP_COLUMNS: dict[str, str] = {
    "step": "int64",
    "start_ns": "int64",
    "end_ns": "int64",
    "host_ns": "int64",
    "num_seqs": "int64",
    "num_tokens": "int64",
    "num_prefill_tokens": "int64",
    "num_decodes": "int64",
    "context_tokens": "int64",
    "running": "int64",
    "waiting": "int64",
    "kv_blocks_used": "int64",
    "kv_blocks_total": "int64",
    "prefix_hit_tokens": "int64",
    "preemptions": "int64",
    "graph": "bool",
    "device_ns": "int64?",
}
"""One row an engine step: `engine.request.StepStats`, times relative to the run's start. `device_ns` is how
long the step took on the device by its own events; null on a CPU."""

TELEMETRY_COLUMNS: dict[str, str] = {
    "time_ns": "int64",
    "device": "int64",
    "power_w": "float64?",
    "energy_j": "float64?",
    "sm_clock_mhz": "float64?",
    "memory_clock_mhz": "float64?",
    "temperature_c": "float64?",
    "memory_used_bytes": "int64?",
    "utilization": "float64?",
    "throttle_reasons": "int64?",
    "host_cpu_percent": "float64?",
    "host_rss_bytes": "int64?",
    "processes": "int64?",
    "usable_cpus": "int64?",
    "process_cpu_s": "float64?",
    "machine_cpu_s": "float64?",
    "steal_s": "float64?",
    "cpu_pressure_s": "float64?",
    "throttled_s": "float64?",
    "involuntary_switches": "int64?",
    "sampler_cpu_s": "float64?",
}
"""One row a sample and device; device -1 is the host. `processes` are those on the GPU, this one too. The
CPU seconds and switches count up from some moment before the run: this process's with its threads; all
processes' on the CPUs it may use; what a hypervisor gave to others meanwhile; in which some task waited for a
CPU; in which the quota of the control group held this process back. `sampler_cpu_s` are those of the process
that read the row's device."""


@dataclass(frozen=True)
class RunRecord:
    """What one run was and what came out of it. Every section is a plain dict that JSON can hold."""

    run: dict[str, Any]
    """uuid, utc, command, label and tags (its user's names for it), seed, error of a failed one, and
    status ("complete" | "interrupted" | "failed")."""
    workload: dict[str, Any] = field(default_factory=dict)
    """name, parameters, content_hash, notes, ideal_prefix_hit_ratio."""
    model: dict[str, Any] = field(default_factory=dict)
    """name, revision, config_hash, dtype, quantization, num_parameters, shape facts."""
    engine: dict[str, Any] = field(default_factory=dict)
    """Every setting of the engine."""
    backend: dict[str, Any] = field(default_factory=dict)
    """asked, used {operation: name}, passed_over, tuned {operation: "tuned" | "untuned: ..." | null},
    kernel_source_hash, linears {role: {scheme, served_by, held_bytes, read_bytes,
    faster_than_dense_up_to_rows, slower_than_dense_from_rows, served_beyond; null = nobody measured}}."""
    system: dict[str, Any] = field(default_factory=dict)
    """device {vendor, arch, name} the engine ran on; every GPU, CPU, RAM."""
    software: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    """docs/metrics.md names and defines every key."""
    memory: dict[str, Any] = field(default_factory=dict)
    energy: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    correctness: dict[str, Any] = field(default_factory=dict)
    accuracy: dict[str, Any] = field(default_factory=dict)
    """corpus, corpus_sha256, against (the unquantized model), sequences {sums of each}, and what follows from
    them; or a reason. Empty in records of before it was measured."""
    speculation: dict[str, Any] = field(default_factory=dict)
    """asked, sampling, synthetic (what was asked, where acceptance was drawn), outcomes and times, and what
    follows from them; or a reason. Empty where the engine did not speculate."""
    target: dict[str, Any] = field(default_factory=dict)
    """Of a server as the target: client {what the client itself cost}, usage (the server's counts), errors
    {message: requests} and server_metrics; empty where the engine ran in this process."""
    roofline: dict[str, Any] = field(default_factory=dict)
    """mbu, mfu, decode_fit {intercept_s, slope_s_per_token, intercept_floor_s, slope_floor_s_per_token}."""
    warmup: dict[str, Any] = field(default_factory=dict)
    """seconds, requests."""
    validity: list[str] = field(default_factory=list)
    """Reasons why the run should not be believed; empty = valid."""
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        status = self.run.get("status")
        if status not in STATUSES:
            raise ReportError(f"run.status must be one of {', '.join(STATUSES)}, not {status!r}.")

    def to_json(self) -> str:
        """The text of run.json: keys sorted, infinities and NaN written as null."""
        return json.dumps(finite(asdict(self)), indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str) -> RunRecord:
        """Parse run.json; `source` names the file in errors."""
        try:
            data = json.loads(text, parse_constant=_no_constant)
        except json.JSONDecodeError as error:
            raise ReportError(
                f"{source} is not valid JSON (line {error.lineno}: {error.msg}); it may be truncated. "
                "Run again or restore it."
            ) from None
        except (RecursionError, ValueError) as error:
            why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise ReportError(f"{source} is no run record: {why}; restore it.") from None
        if not isinstance(data, dict):
            raise ReportError(f"{source} holds no run record: expected a JSON object.")
        check_version(data.get("schema_version"), source)
        for name in ADDED_SECTIONS:
            data.setdefault(name, {})
        names = [each.name for each in fields(cls)]
        if missing := [name for name in names if name not in data]:
            raise ReportError(f"{source} lacks the section {missing[0]!r}; it is not a whole run record.")
        for name in names:
            expected = {"schema_version": int, "validity": list}.get(name, dict)
            if not isinstance(data[name], expected):
                raise ReportError(f"{source}: the section {name!r} must be a JSON {expected.__name__}.")
        if (odd := misshapen({name: data[name] for name in names})) is not None:
            raise ReportError(f"{source} is no run record: {odd}; restore it.")
        return cls(**{name: data[name] for name in names})


def check_version(version: object, source: str, readable: tuple[int, ...] = READABLE) -> None:
    """Raises ReportError unless `version` is one of `readable`; the message says what to do."""
    whole = isinstance(version, int) and not isinstance(version, bool)
    if whole and version in readable:
        return
    reads = f"this Backbench reads {' and '.join(map(str, readable))}"
    if isinstance(version, int) and whole and version > max(readable):
        raise ReportError(f"{source} has schema_version {version}, of a newer Backbench; {reads}. Update it.")
    raise ReportError(
        f"{source} has schema_version {shown(version)}, but {reads}; use the version that wrote it."
    )


def _no_constant(name: str) -> None:
    raise ValueError(f"it holds {name}, which is no JSON")


def finite(value: Any) -> Any:
    """`value` made of plain JSON types: numpy scalars unwrapped, tuples as lists, inf and NaN as None, and
    characters that would steer a terminal or are no text written out."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable(str(key)): finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    if isinstance(value, Path):
        return printable(str(value))
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
