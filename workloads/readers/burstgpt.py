"""BurstGPT traces: CSV, seconds; part 3 has extra columns, so columns are read by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from backbench.workloads.readers.format import has_columns, trace_format
from backbench.workloads.readers.text import BadRows, Clock, read_csv
from backbench.workloads.trace import TraceRow

COLUMNS = ("Timestamp", "Request tokens", "Response tokens")


def read_burstgpt(path: Path, bad: BadRows | None = None) -> Iterator[TraceRow]:
    """Rows in file order; rows with 0 response tokens are recorded failures and left out."""
    bad = bad or BadRows()
    clock = Clock("Timestamp")
    for place, row in read_csv(path, COLUMNS, bad):
        with bad.row():
            arrival_ns = clock.check(place, place.seconds_ns("Timestamp", row["Timestamp"]))
            output_tokens = place.whole("Response tokens", row["Response tokens"])
            fewest = 0 if output_tokens == 0 else 1
            input_tokens = place.whole("Request tokens", row["Request tokens"], fewest)
            if output_tokens > 0:
                session = row.get("Session ID", "").strip() or None
                yield TraceRow(input_tokens, output_tokens, arrival_ns, session=session)


FORMAT = trace_format("burstgpt", has_columns(COLUMNS), read_burstgpt)
