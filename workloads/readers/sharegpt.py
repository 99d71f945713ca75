"""ShareGPT_V3 files: one JSON array of conversations, hundreds of MB, read one conversation at a time."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backbench.errors import WorkloadError
from backbench.workloads.readers.text import UNREADABLE, Place, open_text

CHUNK_CHARACTERS = 1 << 20
PROMPT_ROLES = frozenset({"human", "user"})
ANSWER_ROLES = frozenset({"gpt", "assistant", "chatgpt", "bing", "bard"})


@dataclass(frozen=True)
class Conversation:
    """The first question and its answer."""

    prompt: str
    answer: str
    line: int


def read_sharegpt(path: Path) -> Iterator[Conversation]:
    """The first human turn that a gpt turn follows, of every conversation that has one.

    Over a third of the real file's entries start with a gpt turn: taking turns 0 and 1 blindly would send an
    answer as the prompt. Raises WorkloadError naming file, line and field.
    """
    for place, entry in read_array(path):
        if not isinstance(entry, dict) or not isinstance(entry.get("conversations"), list):
            place.fail("conversations", "missing, or not a list of turns.")
        turns = [_turn(place, turn) for turn in entry["conversations"]]
        for (role, text), (next_role, next_text) in itertools.pairwise(turns):
            if role in PROMPT_ROLES and next_role in ANSWER_ROLES:
                yield Conversation(text, next_text, place.line)
                break


def _turn(place: Place, turn: object) -> tuple[str, str]:
    if not isinstance(turn, dict):
        place.fail("conversations", "a turn is no JSON object.")
    for field in ("from", "value"):
        if not isinstance(turn.get(field), str):
            place.fail(f"conversations.{field}", "missing, or not a string.")
    return turn["from"], turn["value"]


def read_array(path: Path) -> Iterator[tuple[Place, Any]]:
    """The elements of a file's top-level JSON array, each with the line it starts on, without loading it."""
    decoder = json.JSONDecoder()
    with open_text(path) as file:
        buffer, position, line, ended = "", 0, 1, False
        opened = False
        try:
            while True:
                position, line = _skip(buffer, position, line, "" if not opened else ",")
                if position == len(buffer):
                    if ended:
                        Place(path, line).fail("(the array)", "the file ends before its closing ].")
                    buffer, position = file.read(CHUNK_CHARACTERS), 0
                    ended = not buffer
                    continue
                if not opened:
                    if buffer[position] != "[":
                        Place(path, line).fail("(the array)", "a ShareGPT file starts with [.")
                    opened, position = True, position + 1
                    continue
                if buffer[position] == "]":
                    return
                try:
                    element, end = decoder.raw_decode(buffer, position)
                except RecursionError:
                    Place(path, line).fail("(the entry)", "nested too deeply.")
                except json.JSONDecodeError as error:
                    if ended or not _may_be_cut(error, buffer):
                        at = line + buffer.count("\n", position, error.pos)
                        Place(path, at).fail("(the entry)", f"malformed JSON: {error.msg}.")
                    # Read as much again as is already held, so that a long entry costs linear time.
                    rest = buffer[position:]
                    more = file.read(max(CHUNK_CHARACTERS, len(rest)))
                    ended = not more
                    buffer, position = rest + more, 0
                    continue
                yield Place(path, line), element
                line += buffer.count("\n", position, end)
                position = end
        except UNREADABLE as error:
            raise WorkloadError(f"{path}, near line {line}, field (the entry): unreadable: {error}") from None


def _skip(buffer: str, position: int, line: int, separators: str) -> tuple[int, int]:
    """Past white space and `separators`, counting lines."""
    while position < len(buffer) and (buffer[position].isspace() or buffer[position] in separators):
        line += buffer[position] == "\n"
        position += 1
    return position, line


def _may_be_cut(error: json.JSONDecodeError, buffer: str) -> bool:
    """Whether the error is what a chunk's end looks like rather than a mistake in the file."""
    return error.msg.startswith("Unterminated string") or error.pos >= len(buffer) - 16
