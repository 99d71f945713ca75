"""Vidur traces: CSV arrived_at,num_prefill_tokens,num_decode_tokens, seconds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from backbench.workloads.readers.format import has_columns, trace_format
from backbench.workloads.readers.text import Clock, read_csv
from backbench.workloads.trace import TraceRow

COLUMNS = ("arrived_at", "num_prefill_tokens", "num_decode_tokens")


def read_vidur(path: Path) -> Iterator[TraceRow]:
    """Rows in file order. Raises WorkloadError naming file, line and field."""
    clock = Clock("arrived_at")
    for place, row in read_csv(path, COLUMNS):
        yield TraceRow(
            input_tokens=place.whole("num_prefill_tokens", row["num_prefill_tokens"], 1),
            output_tokens=place.whole("num_decode_tokens", row["num_decode_tokens"], 1),
            arrival_ns=clock.check(place, place.seconds_ns("arrived_at", row["arrived_at"])),
        )


FORMAT = trace_format("vidur", has_columns(COLUMNS), read_vidur)
