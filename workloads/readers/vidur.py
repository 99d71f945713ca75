"""Vidur traces: CSV num_prefill_tokens,num_decode_tokens, with seconds in arrived_at or without times."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from backbench.workloads.readers.format import Head, trace_format
from backbench.workloads.readers.text import BadRows, Clock, read_csv
from backbench.workloads.trace import TraceRow

TIME = "arrived_at"
LENGTHS = ("num_prefill_tokens", "num_decode_tokens")


def read_vidur(path: Path, bad: BadRows | None = None) -> Iterator[TraceRow]:
    """Rows in file order, at 0 where there are no times. WorkloadError names file, line and field."""
    bad = bad or BadRows()
    clock = Clock(TIME)
    for place, row in read_csv(path, LENGTHS, bad):
        with bad.row():
            yield TraceRow(
                input_tokens=place.whole(LENGTHS[0], row[LENGTHS[0]], 1),
                output_tokens=place.whole(LENGTHS[1], row[LENGTHS[1]], 1),
                arrival_ns=clock.check(place, place.seconds_ns(TIME, row.get(TIME, 0))),
            )


def _recognise(head: Head) -> int:
    return len(head.columns & {TIME, *LENGTHS}) if head.columns.issuperset(LENGTHS) else 0


FORMAT = trace_format("vidur", _recognise, read_vidur, timed=lambda head: TIME in head.columns)
