"""JSON objects of a file that holds one a line, or one array of them, hundreds of MB, read one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from backbench.errors import WorkloadError, shown
from backbench.workloads.readers.format import read_head
from backbench.workloads.readers.text import UNREADABLE, BadRows, Place, json_problem, open_text, read_jsonl

CHUNK_CHARACTERS = 1 << 20


def read_objects(path: Path, bad: BadRows) -> Iterator[tuple[Place, dict[str, Any]]]:
    """Every object with its place. Raises WorkloadError naming file, line and field."""
    if read_head(path).text.startswith("{"):
        yield from read_jsonl(path, (), bad)
        return
    for place, element in read_array(path):
        bad.rows += 1
        with bad.row():
            if not isinstance(element, dict):
                place.fail("(the entry)", f"{shown(element)} is no JSON object.")
            yield place, element


_NEXT: dict[str, dict[str, str]] = {
    "start": {"[": "first"},
    "first": {"]": "end"},
    "entry": {},
    "separator": {",": "entry", "]": "end"},
    "end": {},
}
"""What is awaited in an array -> the punctuation that may stand there -> what is awaited after it."""
_MISSING = {
    "start": "an array starts with [.",
    "separator": "a comma or the closing ] is missing.",
    "end": "something follows the closing ].",
}


def read_array(path: Path) -> Iterator[tuple[Place, Any]]:
    """The elements of a file's top-level JSON array, each with the line it starts on, without loading it."""
    decoder = json.JSONDecoder()
    with open_text(path) as file:
        buffer, position, line, ended = "", 0, 1, False
        awaited = "start"
        try:
            while True:
                position, line = _skip(buffer, position, line)
                if position == len(buffer):
                    if ended and awaited == "end":
                        return
                    if ended:
                        Place(path, line).fail("(the array)", "the file ends before its closing ].")
                    buffer, position = file.read(CHUNK_CHARACTERS), 0
                    ended = not buffer
                    continue
                if after := _NEXT[awaited].get(buffer[position]):
                    awaited, position = after, position + 1
                    continue
                if awaited in _MISSING:
                    Place(path, line).fail("(the array)", _MISSING[awaited])
                try:
                    element, end = decoder.raw_decode(buffer, position)
                except (ValueError, RecursionError) as error:
                    if ended or not _may_be_cut(error, buffer):
                        at = error.pos if isinstance(error, json.JSONDecodeError) else position
                        place = Place(path, line + buffer.count("\n", position, at))
                        place.fail("(the entry)", json_problem(error))
                    # Read as much again as is already held, so that a long entry costs linear time.
                    rest = buffer[position:]
                    more = file.read(max(CHUNK_CHARACTERS, len(rest)))
                    ended = not more
                    buffer, position = rest + more, 0
                    continue
                yield Place(path, line), element
                line += buffer.count("\n", position, end)
                position, awaited = end, "separator"
        except UNREADABLE as error:
            raise WorkloadError(f"{path}, near line {line}, field (the entry): unreadable: {error}") from None


def _skip(buffer: str, position: int, line: int) -> tuple[int, int]:
    """Past JSON's white space, counting lines."""
    while position < len(buffer) and buffer[position] in " \t\n\r":
        line += buffer[position] == "\n"
        position += 1
    return position, line


def _may_be_cut(error: Exception, buffer: str) -> bool:
    """Whether the error is what a chunk's end looks like rather than a mistake in the file."""
    return isinstance(error, json.JSONDecodeError) and (
        error.msg.startswith("Unterminated string") or error.pos >= len(buffer) - 16
    )
