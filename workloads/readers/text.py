"""What every reader needs: lines of a plain or gzipped file, rows of CSV and JSONL, checked fields."""

from __future__ import annotations

import csv
import gzip
import json
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TextIO

from backbench.errors import WorkloadError, shown
from backbench.workloads.trace import LATEST_NS

UNREADABLE = (UnicodeDecodeError, EOFError, OSError, zlib.error)
"""What reading a damaged or binary file raises; a bad gzip header is an OSError."""
MAXIMUM_TOKENS = 100_000_000
"""A larger token count is a misread column, not a request."""
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
MAXIMUM_LINE = 1 << 26
"""Characters; a longer line is no row of a trace, and is refused before it fills the memory."""


@dataclass(frozen=True)
class Place:
    """Where a value stands, for errors. What they show of a file is printable, whatever it holds."""

    path: Path
    line: int

    def fail(self, field: str, problem: str) -> NoReturn:
        """Raise WorkloadError naming file, line and field."""
        name = field if field.isprintable() and len(field) <= 40 else shown(field)
        raise WorkloadError(f"{self.path}, line {self.line}, field {name}: {problem}")

    def whole(self, field: str, value: object, minimum: int = 0, maximum: int = MAXIMUM_TOKENS) -> int:
        """A whole number in [minimum, maximum], from JSON or from CSV text."""
        text = str(value).strip()
        is_number = isinstance(value, (int, float, str)) and not isinstance(value, bool)
        # Writers that know floats only say 40.0.
        found = re.fullmatch(r"(-?[0-9]{1,20})(?:\.0+)?", text) if is_number else None
        if found is None:
            self.fail(field, f"{shown(value)} is no whole number.")
        number = int(found.group(1))
        if not minimum <= number <= maximum:
            self.fail(field, f"{number} is not between {minimum} and {maximum}.")
        return number

    def seconds_ns(self, field: str, value: object, unit_ns: int = 1_000_000_000) -> int:
        """A time of at least 0, given in units of `unit_ns` (seconds by default), in ns."""
        try:
            if isinstance(value, bool):
                raise TypeError
            number = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            self.fail(field, f"{shown(value)} is no number.")
        if not (math.isfinite(number) and 0 <= number * unit_ns < LATEST_NS):
            self.fail(field, f"{shown(value)} is no time between 0 and 146 years.")
        return round(number * unit_ns)

    def require_encodable(self, field: str, text: str) -> None:
        """Half of a surrogate pair (a cut emoji, say) is no text that can be tokenized."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = shown(text[error.start])
            self.fail(field, f"{half} is half of a surrogate pair and no character; mend the text.")

    def session(self, value: object, field: str = "session_id") -> str | None:
        """A session's name as text; None where the row has none."""
        if value is None:
            return None
        self.require_encodable(field, str(value))
        return str(value)


MOST_BAD_ROWS = 100
"""So many rows may be skipped in any file; beyond them, a tenth of those read."""


class BadRows:
    """What happens to a row that is no request: it ends the reading, or it is left out and counted."""

    def __init__(self, skip: bool = False) -> None:
        self.skip = skip
        self.rows = 0
        """Read so far, good and bad."""
        self.skipped = 0
        self.first: str | None = None
        """What was wrong with the first that was skipped."""

    @contextmanager
    def row(self) -> Iterator[None]:
        """Around what is done with a row. WorkloadError where a bad one may not be skipped."""
        try:
            yield
        except WorkloadError as error:
            if not self.skip:
                raise
            self.skipped += 1
            self.first = self.first or str(error)
            if self.skipped > max(MOST_BAD_ROWS, self.rows // 10):
                raise WorkloadError(
                    f"{self.skipped} of {self.rows} rows cannot be read, more than may be skipped; "
                    f"the first: {shown(self.first, 150)}"
                ) from None

    def record(self) -> dict[str, Any]:
        """For the workload's source; nothing where no row was skipped."""
        return {"bad_rows": {"skipped": self.skipped, "first": self.first}} if self.skipped else {}


def is_file(path: Path) -> bool:
    """Whether this is a file with an end: no folder, pipe or device, and a name that can be one."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        # Too long, in a folder that may not be read, or with a NUL: nothing that could be opened.
        return False


def open_text(path: Path) -> TextIO:
    """Open for reading as UTF-8; gzip is recognised by its first two bytes, not by the name."""
    try:
        with path.open("rb") as file:
            head = file.read(len(LFS_POINTER))
    except OSError as error:
        raise WorkloadError(f"cannot read '{path}': {error.strerror}.") from None
    if head == LFS_POINTER:
        raise WorkloadError(f"'{path}' is a Git LFS pointer, not the file it stands for; run git lfs pull.")
    if head.startswith(b"\x1f\x8b"):
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open("r", encoding="utf-8-sig", newline="")


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Every line with its number. Unreadable bytes become a WorkloadError at the line they follow."""
    number = 0
    with open_text(path) as file:
        try:
            while line := file.readline(MAXIMUM_LINE):
                number += 1
                if len(line) == MAXIMUM_LINE:
                    Place(path, number).fail("(the whole line)", f"longer than {MAXIMUM_LINE} characters.")
                yield number, line
        except UNREADABLE as error:
            Place(path, number + 1).fail("(the whole line)", f"unreadable: {error}")


def read_lines(path: Path) -> Iterator[tuple[Place, str]]:
    """As `numbered_lines`, with the line's place."""
    for number, line in numbered_lines(path):
        yield Place(path, number), line


class Table:
    """A CSV file's header, and its rows as they stream by."""

    def __init__(self, path: Path, columns: Sequence[str], bad: BadRows, delimiter: str = ",") -> None:
        """Reads the header, which must hold `columns`, in any order, among others or not."""
        self.path = path
        self.bad = bad
        self._rows = csv.reader((line for _, line in numbered_lines(path)), delimiter=delimiter)
        first = next(self._read(), (1, []))[1]
        self.header = [name.strip() for name in first]
        """Names of the columns."""
        for name in columns:
            if name not in self.header:
                header = shown(", ".join(self.header), 120)
                Place(path, max(self._rows.line_num, 1)).fail(
                    name, f"no such column; the header has {header}."
                )

    def rows(self) -> Iterator[tuple[int, list[str]]]:
        """Number of a row's last line, and its values, as many as the header has; empty lines are none."""
        width = len(self.header)
        for number, row in self._read():
            if not row:
                continue
            self.bad.rows += 1
            if len(row) == width:
                yield number, row
                continue
            with self.bad.row():
                field = self.header[min(len(row), width - 1)]
                Place(self.path, number).fail(field, f"{len(row)} values where the header has {width}.")

    def _read(self) -> Iterator[tuple[int, list[str]]]:
        try:
            for row in self._rows:
                yield self._rows.line_num, row
        except csv.Error as error:
            Place(self.path, max(self._rows.line_num, 1)).fail("(the whole line)", f"malformed CSV: {error}")


def read_csv(
    path: Path, columns: Sequence[str], bad: BadRows | None = None, delimiter: str = ","
) -> Iterator[tuple[Place, dict[str, str]]]:
    """Rows by column name, with their places. The header must hold `columns`."""
    table = Table(path, columns, bad or BadRows(), delimiter)
    for number, row in table.rows():
        yield Place(path, number), dict(zip(table.header, row, strict=True))


def read_jsonl(
    path: Path, fields: Sequence[str], bad: BadRows | None = None
) -> Iterator[tuple[Place, dict[str, Any]]]:
    """One JSON object a line; each must hold `fields`."""
    bad = bad or BadRows()
    for place, line in read_lines(path):
        if not line.strip():
            continue
        bad.rows += 1
        with bad.row():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                place.fail("(the whole line)", json_problem(error))
            if not isinstance(row, dict):
                place.fail("(the whole line)", f"{shown(row)} is no JSON object.")
            for name in fields:
                if name not in row:
                    place.fail(name, "is missing.")
            yield place, row


def json_problem(error: ValueError | RecursionError) -> str:
    """What is wrong with a JSON text, from what Python's reader raised."""
    if isinstance(error, json.JSONDecodeError):
        return f"malformed JSON: {error.msg} at character {error.colno}."
    if isinstance(error, RecursionError):
        return "nested too deeply."
    return "holds a number of thousands of digits."


def whole_list(place: Place, field: str, value: object) -> tuple[int, ...]:
    """A JSON list of whole numbers of at least 0: token ids, or block ids of up to 64 bits."""
    if not isinstance(value, list):
        place.fail(field, f"{shown(value)} is no list.")
    return tuple(place.whole(field, item, 0, 2**64 - 1) for item in value)


@dataclass
class Clock:
    """Checks that a trace's times do not go backwards."""

    field: str
    last_ns: int = 0

    def check(self, place: Place, arrival_ns: int) -> int:
        """The time itself; WorkloadError when it lies before the row above, or beyond LATEST_NS."""
        if arrival_ns < self.last_ns:
            place.fail(self.field, "goes back in time; sort the file by time.")
        if arrival_ns >= LATEST_NS:
            place.fail(self.field, "is more than 146 years after the first.")
        self.last_ns = arrival_ns
        return arrival_ns
