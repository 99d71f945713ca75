"""Azure LLM inference traces (2023, and the 2024 weeks): CSV TIMESTAMP,ContextTokens,GeneratedTokens.

The weeks have up to 27 million rows, so what a row is checked for is remembered: a minute and a count that
were right once are right again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import date
from operator import itemgetter
from pathlib import Path

from backbench.errors import shown
from backbench.workloads.readers.format import has_columns, trace_format
from backbench.workloads.readers.text import BadRows, Clock, Place, Table
from backbench.workloads.trace import TraceRow

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_TIMESTAMP = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[ T](\d\d):(\d\d):(\d\d)(?:\.(\d{1,9}))?(?:Z|\+00:00)?", re.ASCII
)
_MINUTE = len("2023-11-16 18:15")
_SECONDS = re.compile(r":([0-5]\d)(?:\.(\d{1,9}))?(?:Z|\+00:00)?", re.ASCII)
_REMEMBERED = 1 << 16
"""Counts whose texts are remembered; a context has no more lengths."""


def read_azure(path: Path, bad: BadRows | None = None) -> Iterator[TraceRow]:
    """Rows in file order; the first arrives at 0. Raises WorkloadError naming file, line and field."""
    bad = bad or BadRows()
    table = Table(path, COLUMNS, bad)
    values = itemgetter(*(table.header.index(name) for name in COLUMNS))
    clock = Clock("TIMESTAMP")
    start_ns: int | None = None
    minute, minute_ns = "", 0
    counts: dict[str, int] = {}
    for number, row in table.rows():
        stamp, inputs, outputs = values(row)
        if start_ns is not None and stamp[:_MINUTE] == minute:
            seconds = _SECONDS.fullmatch(stamp, _MINUTE)
            input_tokens, output_tokens = counts.get(inputs), counts.get(outputs)
            if seconds and input_tokens and output_tokens:
                arrival_ns = minute_ns + _seconds_ns(*seconds.groups()) - start_ns
                if arrival_ns >= clock.last_ns:
                    clock.last_ns = arrival_ns
                    yield TraceRow(input_tokens, output_tokens, arrival_ns)
                    continue
        place = Place(path, number)
        with bad.row():
            absolute_ns = timestamp_ns(place, stamp)
            start_ns = absolute_ns if start_ns is None else start_ns
            checked = TraceRow(
                input_tokens=place.whole(COLUMNS[1], inputs, 1),
                output_tokens=place.whole(COLUMNS[2], outputs, 1),
                arrival_ns=clock.check(place, absolute_ns - start_ns),
            )
            if _SECONDS.fullmatch(stamp, _MINUTE):
                minute, minute_ns = stamp[:_MINUTE], absolute_ns - absolute_ns % 60_000_000_000
            if len(counts) < _REMEMBERED:
                counts |= {inputs: checked.input_tokens, outputs: checked.output_tokens}
            yield checked


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
    return ((days * 24 + hour) * 60 + minute) * 60_000_000_000 + _seconds_ns(match[6], match[7])


def _seconds_ns(seconds: str, fraction: str | None) -> int:
    return int(seconds) * 1_000_000_000 + (int(fraction.ljust(9, "0")) if fraction else 0)


FORMAT = trace_format("azure", has_columns(COLUMNS), read_azure)
