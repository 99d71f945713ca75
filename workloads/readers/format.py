"""What a trace format declares about itself: the one thing a new reader's file must hold."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from backbench.errors import WorkloadError, shown
from backbench.workloads.draft import TRACE_OPTIONS, Draft, draft_trace
from backbench.workloads.options import WorkloadOptions
from backbench.workloads.readers.text import UNREADABLE, BadRows, open_text
from backbench.workloads.trace import TraceRow

_HEAD_CHARACTERS = 1 << 20
_ARRAY_CHARACTERS = 1 << 14


@dataclass(frozen=True)
class Head:
    """A file's first line that is not empty (of JSON over many lines: its beginning): it tells the format."""

    text: str

    @property
    def columns(self) -> frozenset[str]:
        """The names of a CSV header; none where the file is JSON."""
        if self.text.startswith(("{", "[")):
            return frozenset()
        return frozenset(name.strip() for name in self.text.split(","))

    @property
    def names(self) -> frozenset[str]:
        """The names in JSON, of whatever depth; none where the file is no JSON."""
        if not self.text.startswith(("{", "[")):
            return frozenset()
        return frozenset(re.findall(r'"(\w+)"\s*:', self.text, re.ASCII))

    @property
    def fields(self) -> frozenset[str]:
        """The names in a JSON object; none where the file is no JSONL."""
        if not self.text.startswith("{"):
            return frozenset()
        try:
            return frozenset(json.loads(self.text))
        except (ValueError, RecursionError):
            # Malformed, or longer than a head is read: the likeliest reader shall name line and mistake.
            return self.names


def read_head(path: Path) -> Head:
    """The head of a file; WorkloadError where it is no readable text."""
    with open_text(path) as file:
        try:
            lines = iter(lambda: file.readline(_HEAD_CHARACTERS), "")
            text = next((line.strip() for line in lines if line.strip()), "")
            spread_out = text.startswith("[") or text == "{"
            while spread_out and len(text) < _ARRAY_CHARACTERS:
                more = next(lines, None)
                if more is None:
                    break
                text += more.strip()
            return Head(text)
        except UNREADABLE as error:
            raise WorkloadError(f"{shown(str(path), 150)} is no readable text: {error}.") from None


@dataclass(frozen=True)
class Format:
    """A trace format. Its module in `workloads/readers` holds it as `FORMAT`; nothing else names it."""

    name: str
    """Its `kind` in the record."""
    recognise: Callable[[Head], int]
    """How many of the head's names speak for this format; 0: it is another. The largest number wins."""
    options: frozenset[str]
    """The fields of WorkloadOptions that it takes, besides those that every workload takes."""
    draft: Callable[[Path, WorkloadOptions], Draft]
    """The file as a workload. Raises WorkloadError naming file, line and field."""
    folder: str = ""
    """Names (a glob pattern) of the files of a folder that is one workload of this format; empty: none is."""


def trace_format(
    name: str,
    recognise: Callable[[Head], int],
    read: Callable[[Path, BadRows], Iterator[TraceRow]],
    *,
    timed: Callable[[Head], bool] = lambda head: True,
    notes: tuple[str, ...] = (),
) -> Format:
    """A format of lengths and recorded times, without text; `timed` tells of a file whether it has times."""

    def draft(path: Path, options: WorkloadOptions) -> Draft:
        bad = BadRows(skip=options.bad_rows == "skip")
        source = {"kind": name, "data": path.name}
        return draft_trace(
            path.name,
            read(path, bad),
            source,
            options,
            count=options.num_requests,
            timed=timed(read_head(path)),
            notes=notes,
            bad=bad,
        )

    return Format(name, recognise, TRACE_OPTIONS | {"bad_rows"}, draft)


def has_columns(columns: Collection[str]) -> Callable[[Head], int]:
    """Recognises CSV whose header holds all of `columns`."""
    return lambda head: len(columns) if head.columns.issuperset(columns) else 0
