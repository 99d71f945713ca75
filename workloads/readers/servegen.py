"""ServeGen's chunks: how one client's requests arrive, ten minutes by ten minutes, and how long they are.

chunk-N-trace.csv has no header: start in s, requests/s, the gaps' coefficient of variation, Gamma or Weibull,
and two fitted numbers, which rate and variation make superfluous. chunk-N-dataset.json beside it holds
{"0": {"input_tokens": "{3039: 0.005, ...}", "output_tokens": "{...}"}, "21600": ...}: from which second on,
which lengths, how likely. A folder of chunks is all of its clients together.

The chunks hold no requests: those are drawn, with the seed, from a window's process and lengths.
"""

from __future__ import annotations

import heapq
import json
import math
import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backbench.errors import WorkloadError, shown
from backbench.workloads.arrivals import Arrivals
from backbench.workloads.draft import TRACE_OPTIONS, Draft, draft_trace
from backbench.workloads.options import WorkloadOptions
from backbench.workloads.readers.format import Format, Head
from backbench.workloads.readers.text import (
    MAXIMUM_TOKENS,
    UNREADABLE,
    BadRows,
    Place,
    is_file,
    json_problem,
    open_text,
    read_lines,
)
from backbench.workloads.streams import stream
from backbench.workloads.trace import TraceRow

CHUNKS = "chunk-*-trace.csv"
COLUMNS = ("start", "rate", "cv", "pattern", "first number", "second number")
PATTERNS = {
    "gamma": "gamma",
    "weibull": "weibull",
    "exponential": "poisson",
    "expon": "poisson",
    "poisson": "poisson",
}
WINDOW_S = 600
"""A window's length; it ends earlier where the next one starts."""
NOTE = "drawn from a client's arrival processes and lengths: the file holds no requests."
_LINE = re.compile(r"[0-9]+(?:\.[0-9]*)?,[0-9][^,]*,[^,]*,[A-Za-z]*,[^,]*,[^,]*")
_DRAWN = 4096
"""At most so many requests are drawn together."""


@dataclass(frozen=True)
class Window:
    """From `start_s` on, for `length_s`; `arrivals` None: nothing is sent."""

    start_s: float
    length_s: float
    arrivals: Arrivals | None


@dataclass(frozen=True)
class Drawn:
    """Lengths in tokens and the distribution function at each."""

    lengths: NDArray[np.int64]
    cumulative: NDArray[np.float64]

    def sample(self, generator: np.random.Generator, count: int) -> list[int]:
        places = np.searchsorted(self.cumulative, generator.random(count), side="right")
        return [int(each) for each in self.lengths[np.minimum(places, len(self.lengths) - 1)]]


def read_servegen(path: Path, options: WorkloadOptions, bad: BadRows | None = None) -> Iterator[TraceRow]:
    """The requests of a client, or of every client of a folder, in order of time.

    Raises WorkloadError naming file and field.
    """
    chunks = [path] if is_file(path) else sorted(path.glob(CHUNKS))
    clients = [_client(chunk, options.seed, bad or BadRows()) for chunk in chunks]
    return heapq.merge(*clients, key=lambda row: row.arrival_ns)


def _client(path: Path, seed: int, bad: BadRows) -> Iterator[TraceRow]:
    windows = read_windows(path, bad)
    lengths = _Lengths(path.with_name(path.name.replace("-trace.csv", "-dataset.json")))
    for window in windows:
        if window.arrivals is None:
            continue
        inputs, outputs = lengths.at(window.start_s)
        draws = stream(seed, f"servegen/{path.name}", int(window.start_s))
        rate = window.arrivals.rate or 1.0
        at_s, end_s = window.start_s, window.start_s + window.length_s
        while at_s < end_s:
            count = min(_DRAWN, 16 + round(1.2 * rate * (end_s - at_s)))
            times_s = at_s + np.cumsum(window.arrivals.gaps(draws, count)) / rate
            within = times_s[times_s < end_s].tolist()
            pairs = zip(inputs.sample(draws, count), outputs.sample(draws, count), strict=True)
            for time_s, (input_tokens, output_tokens) in zip(within, pairs, strict=False):
                yield TraceRow(input_tokens, output_tokens, round(time_s * 1e9))
            at_s = float(times_s[-1])


def read_windows(path: Path, bad: BadRows) -> list[Window]:
    """The windows of chunk-N-trace.csv. Raises WorkloadError naming file, line and field."""
    found: list[tuple[float, Arrivals | None]] = []
    for place, line in read_lines(path):
        if not line.strip():
            continue
        bad.rows += 1
        with bad.row():
            values = [value.strip() for value in line.split(",")]
            if len(values) != len(COLUMNS):
                place.fail("(the whole line)", f"{len(values)} values, not {len(COLUMNS)}.")
            start_s = place.seconds_ns("start", values[0]) / 1e9
            if found and start_s <= found[-1][0]:
                place.fail("start", "goes back in time; sort the file by time.")
            found.append((start_s, _arrivals(place, values)))
    ends = [*(start_s for start_s, _ in found[1:]), math.inf]
    return [
        Window(start_s, min(end_s - start_s, WINDOW_S), arrivals)
        for (start_s, arrivals), end_s in zip(found, ends, strict=True)
    ]


def _arrivals(place: Place, values: list[str]) -> Arrivals | None:
    numbers = []
    for name, value in zip(COLUMNS[1:3], values[1:3], strict=True):
        try:
            numbers.append(float(value or 0))
        except ValueError:
            place.fail(name, f"{shown(value)} is no number.")
    rate, cv = numbers
    if rate == 0:
        return None
    kind = PATTERNS.get(values[3].lower())
    if kind is None:
        place.fail("pattern", f"{shown(values[3])} is none of Gamma, Weibull and Exponential.")
    try:
        return Arrivals(kind, rate, None if kind == "poisson" else cv)
    except WorkloadError as error:
        place.fail("rate", f"{shown(values[1])} with cv {shown(values[2])}: {error}")


class _Lengths:
    """A client's length distributions; each is parsed when a window first needs it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.windows = _read_json(path)
        try:
            self.starts = sorted((float(key), key) for key, value in self.windows.items() if _filled(value))
        except ValueError:
            raise WorkloadError(f"{path}: its names must be seconds; one is not.") from None
        if not self.starts or not all(math.isfinite(start) for start, _ in self.starts):
            raise WorkloadError(f"{path} has no window with input_tokens and output_tokens.")
        self._known: dict[str, tuple[Drawn, Drawn]] = {}

    def at(self, second: float) -> tuple[Drawn, Drawn]:
        """Of prompts and of outputs: the latest window's that has any, else the first one's."""
        _, key = self.starts[max(0, bisect_right(self.starts, (second, "\U0010ffff")) - 1)]
        if key not in self._known:
            held = self.windows[key]
            self._known[key] = (
                self._drawn(key, held, "input_tokens"),
                self._drawn(key, held, "output_tokens"),
            )
        return self._known[key]

    def _drawn(self, key: str, held: dict[str, Any], name: str) -> Drawn:
        try:
            parts = [part.partition(":") for part in held[name].strip().strip("{}").split(",")]
            pairs = sorted((int(length), float(weight)) for length, _, weight in parts)
            lengths, weights = (np.array(values) for values in zip(*pairs, strict=True))
            fits = lengths[0] >= 1 and lengths[-1] <= MAXIMUM_TOKENS and (weights >= 0).all()
            total = weights.sum()
        except (ValueError, OverflowError):
            fits = False
        if not fits or not (math.isfinite(total) and total > 0):
            raise WorkloadError(
                f"{self.path}, field {shown(key)}.{name}: is no distribution like {{374: 0.5, 375: 0.5}}."
            )
        return Drawn(lengths.astype(np.int64), np.cumsum(weights) / total)


def _filled(window: Any) -> bool:
    names = ("input_tokens", "output_tokens")
    texts = [window.get(name) for name in names] if isinstance(window, dict) else []
    return bool(texts) and all(isinstance(text, str) and text.strip().strip("{}").strip() for text in texts)


def _read_json(path: Path) -> dict[str, Any]:
    if not is_file(path):
        raise WorkloadError(f"no {shown(str(path), 150)}; a chunk's lengths stand beside its trace.")
    try:
        with open_text(path) as file:
            held = json.loads(file.read())
    except UNREADABLE as error:
        raise WorkloadError(f"{path} is unreadable: {error}") from None
    except (ValueError, RecursionError) as error:
        raise WorkloadError(f"{path}: {json_problem(error)}") from None
    if not isinstance(held, dict):
        raise WorkloadError(f"{path}: {shown(held)} is no JSON object.")
    return held


def draft_servegen(path: Path, options: WorkloadOptions) -> Draft:
    """The chunk, or the folder of chunks, as a workload."""
    bad = BadRows(skip=options.bad_rows == "skip")
    source = {"kind": "servegen", "data": path.name}
    rows = read_servegen(path, options, bad)
    draft = draft_trace(path.name, rows, source, options, count=options.num_requests, bad=bad)
    return replace(draft, notes=(NOTE,))


def _recognise(head: Head) -> int:
    return len(COLUMNS) if _LINE.fullmatch(head.text) else 0


FORMAT = Format("servegen", _recognise, TRACE_OPTIONS | {"bad_rows"}, draft_servegen, folder=CHUNKS)
