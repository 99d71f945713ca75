"""Where the memory went: peaks from telemetry, and what the subject and torch know, reconciled to a total."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from backbench.reports.metrics.metric import ABSENT, Metric, Part
from backbench.reports.metrics.run import RunTables

if TYPE_CHECKING:
    import pandas as pd

ON_CPU = "the engine ran on no GPU"
REASONS = {
    "torch_allocated_peak_bytes": ON_CPU,
    "torch_reserved_peak_bytes": ON_CPU,
    "device_idle_bytes": ON_CPU,
    "device_used_peak_minus_idle_bytes": ON_CPU,
    "other_bytes": "the parts exceed the total: untouched pages of the KV pool are not resident",
}
"""Why a number is null where nothing else is known of it."""


def explained(section: dict[str, Any], on_gpu: bool) -> dict[str, Any]:
    """The record's `memory` section with a reason beside every null."""
    unknown = "neither a sensor nor the subject told it"
    reasons = {
        name: unknown if on_gpu else REASONS.get(name, unknown)
        for name, value in section.items()
        if value is None
    }
    if section.get("other_bytes", 0) is None and section.get("total_bytes") is not None:
        reasons["other_bytes"] = REASONS["other_bytes"]
    return section | ({ABSENT: reasons} if reasons else {})


def _peak(telemetry: pd.DataFrame | None, column: str) -> int | None:
    if telemetry is None:
        return None
    known = telemetry[column].dropna()
    return None if known.empty else int(known.max())


def _given(run: RunTables, key: str) -> Any:
    return (run.given.get("memory") or {}).get(key)


def _host_peak(run: RunTables) -> int | None:
    return _peak(run.telemetry, "host_rss_bytes")


def _device_peak(run: RunTables) -> int | None:
    """Null where no sample of the telemetry says it: then the driver was asked at the run's end."""
    peak, idle = _peak(run.telemetry, "memory_used_bytes"), _given(run, "device_idle_bytes")
    return None if peak is None or idle is None else peak - idle


def _total(run: RunTables) -> int | None:
    return _device_peak(run) if run.context.gpus else _host_peak(run)


def _other(run: RunTables) -> int | None:
    """What the total holds beyond weights and KV pool; null where the parts exceed it."""
    total, parts = _given(run, "total_bytes"), [_given(run, "weights_bytes"), _given(run, "kv_pool_bytes")]
    if total is None or None in parts:
        return None
    rest = int(total - sum(parts))
    return rest if rest >= 0 else None


SHOWN = Part()


def _bytes(
    key: str,
    label: str,
    definition: str,
    compute: Callable[[RunTables], Any] | None = None,
    better: bool | None = False,
    part: Part = SHOWN,
) -> Metric:
    return Metric(("memory", key), label, "bytes", better, definition, compute, "Memory", parts=(part,))


METRICS: tuple[Metric, ...] = (
    _bytes(
        "total_bytes",
        "Memory, total",
        "What this process took: the device's peak above idle on a GPU, the peak resident set on a CPU.",
        _total,
        part=Part(headline=True, summary=True),
    ),
    _bytes("weights_bytes", "Weights", "Bytes of the weights, with their scales and zero points."),
    _bytes(
        "weights_read_bytes",
        "Weights read a step",
        "Bytes of weights that every step reads: an embedding that is not the head is only looked up.",
    ),
    _bytes("kv_pool_bytes", "KV pool reserved", "Bytes of the KV pool.", better=None),
    _bytes("kv_used_peak_bytes", "KV used, peak", "Bytes of most KV blocks in use.", part=Part(summary=True)),
    _bytes("other_bytes", "Other memory", "The total without weights and KV pool.", _other),
    _bytes("torch_allocated_peak_bytes", "Torch allocated, peak", "Most bytes in torch's tensors."),
    _bytes("torch_reserved_peak_bytes", "Torch reserved, peak", "Most bytes torch took from the device."),
    _bytes(
        "device_used_peak_minus_idle_bytes",
        "Device used, peak minus idle",
        "Most bytes in use on the device, less what was in use before this process took it.",
        _device_peak,
    ),
    _bytes("host_rss_peak_bytes", "Host RSS, peak", "Most bytes resident in this process.", _host_peak),
)
