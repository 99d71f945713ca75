"""What a trace format declares about itself: the one thing a new reader's file must hold."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from backbench.workloads.draft import TRACE_OPTIONS, Draft, draft_trace
from backbench.workloads.options import WorkloadOptions
from backbench.workloads.trace import TraceRow


@dataclass(frozen=True)
class Head:
    """A file's first line that is not empty, by which its format is told."""

    text: str

    @property
    def columns(self) -> frozenset[str]:
        """The names of a CSV header; none where the file is JSON."""
        if self.text.startswith(("{", "[")):
            return frozenset()
        return frozenset(name.strip() for name in self.text.split(","))

    @property
    def fields(self) -> frozenset[str]:
        """The names in a JSON object; none where the file is no JSONL."""
        if not self.text.startswith("{"):
            return frozenset()
        try:
            return frozenset(json.loads(self.text))
        except (ValueError, RecursionError):
            # Malformed, or longer than a head is read: the likeliest reader shall name line and mistake.
            return frozenset(re.findall(r'"(\w+)"\s*:', self.text, re.ASCII))


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


def trace_format(
    name: str,
    recognise: Callable[[Head], int],
    read: Callable[[Path], Iterator[TraceRow]],
    *,
    tick_ns: int | None = None,
    notes: tuple[str, ...] = (),
) -> Format:
    """A format of lengths and recorded times, without text; `tick_ns` where times lie on ticks."""

    def draft(path: Path, options: WorkloadOptions) -> Draft:
        source = {"kind": name, "data": path.name}
        return draft_trace(
            path.name, read(path), source, options, count=options.num_requests, tick_ns=tick_ns, notes=notes
        )

    return Format(name, recognise, TRACE_OPTIONS | ({"tick"} if tick_ns else set()), draft)


def has_columns(columns: Collection[str]) -> Callable[[Head], int]:
    """Recognises CSV whose header holds all of `columns`."""
    return lambda head: len(columns) if head.columns.issuperset(columns) else 0
