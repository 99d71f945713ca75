"""Azure LLM inference traces (2023, and the 2024 weeks): CSV TIMESTAMP,ContextTokens,GeneratedTokens."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import date
from pathlib import Path

from backbench.errors import shown
from backbench.workloads.readers.format import has_columns, trace_format
from backbench.workloads.readers.text import BadRows, Clock, Place, read_csv
from backbench.workloads.trace import TraceRow

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_TIMESTAMP = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[ T](\d\d):(\d\d):(\d\d)(?:\.(\d{1,9}))?(?:Z|\+00:00)?", re.ASCII
)


def read_azure(path: Path, bad: BadRows | None = None) -> Iterator[TraceRow]:
    """Rows in file order; the first arrives at 0. Raises WorkloadError naming file, line and field."""
    bad = bad or BadRows()
    start_ns: int | None = None
    clock = Clock("TIMESTAMP")
    for place, row in read_csv(path, COLUMNS, bad):
        with bad.row():
            absolute_ns = timestamp_ns(place, row["TIMESTAMP"])
            start_ns = absolute_ns if start_ns is None else start_ns
            yield TraceRow(
                input_tokens=place.whole("ContextTokens", row["ContextTokens"], 1),
                output_tokens=place.whole("GeneratedTokens", row["GeneratedTokens"], 1),
                arrival_ns=clock.check(place, absolute_ns - start_ns),
            )


def timestamp_ns(place: Place, text: str) -> int:
    """`2023-11-16 18:15:46.6805900` in ns, exactly.

    `strptime` knows at most 6 fractional digits and the traces have 7, so the digits are read as integers.
    """
    match = _TIMESTAMP.fullmatch(text.strip())
    if match is None:
        place.fail("TIMESTAMP", f"{shown(text)} is not like 2023-11-16 18:15:46.6805900.")
    year, month, day, hour, minute, second = (int(part) for part in match.groups()[:6])
    if hour > 23 or minute > 59 or second > 59:
        place.fail("TIMESTAMP", f"{shown(text)} is no time of day.")
    try:
        days = date(year, month, day).toordinal()
    except ValueError as error:
        place.fail("TIMESTAMP", f"{shown(text)} is no date: {error}.")
    seconds = ((days * 24 + hour) * 60 + minute) * 60 + second
    return seconds * 1_000_000_000 + int((match.group(7) or "0").ljust(9, "0"))


FORMAT = trace_format("azure", has_columns(COLUMNS), read_azure)
