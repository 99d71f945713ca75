"""ShareGPT_V3 files: one JSON array of conversations, hundreds of MB, read one conversation at a time."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backbench.errors import WorkloadError, shown
from backbench.workloads.draft import OFFER_OPTIONS, Draft
from backbench.workloads.options import WorkloadOptions, choose_offer
from backbench.workloads.readers.format import Format
from backbench.workloads.readers.text import UNREADABLE, Place, is_file, json_problem, open_text
from backbench.workloads.streams import stream
from backbench.workloads.trace import TraceRow

CHUNK_CHARACTERS = 1 << 20
DEFAULT_REQUESTS = 64
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
                for said in (text, next_text):
                    place.require_encodable("conversations.value", said)
                yield Conversation(text, next_text, place.line)
                break


def _turn(place: Place, turn: object) -> tuple[str, str]:
    if not isinstance(turn, dict):
        place.fail("conversations", "a turn is no JSON object.")
    for field in ("from", "value"):
        if not isinstance(turn.get(field), str):
            place.fail(f"conversations.{field}", "missing, or not a string.")
    return turn["from"], turn["value"]


_NEXT: dict[str, dict[str, str]] = {
    "start": {"[": "first"},
    "first": {"]": "end"},
    "entry": {},
    "separator": {",": "entry", "]": "end"},
    "end": {},
}
"""What is awaited in an array -> the punctuation that may stand there -> what is awaited after it."""
_MISSING = {
    "start": "a ShareGPT file starts with [.",
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


def draft_file(name: str, path: Path, options: WorkloadOptions) -> Draft:
    """A file's conversations in an order drawn from the seed, under the name `name`."""
    return draft_conversations(
        name, lambda max_total: _tokenized(path, options, max_total), {"data": path.name}, options
    )


def draft_conversations(
    name: str,
    kept: Callable[[int], Iterator[TraceRow]],
    source: dict[str, Any],
    options: WorkloadOptions,
    notes: tuple[str, ...] = (),
) -> Draft:
    """The first conversations that `kept` yields, given the most tokens that one may have together.

    The usual serving filter keeps prompts of 4..1024 tokens, outputs of at least 4, and at most 2048 tokens
    (or the model's context, if that is less) together.
    """
    count = options.num_requests or DEFAULT_REQUESTS
    max_total = min(2048, options.max_len or 2048)
    rows = list(itertools.islice(kept(max_total), count))
    if len(rows) < count:
        raise WorkloadError(
            f"only {len(rows)} conversations pass the filter (at most {max_total} tokens together), not "
            f"{count}; lower --num-requests."
        )
    if max_total < 2048:
        notes = (*notes, f"conversations over the model's context of {max_total} tokens are left out.")
    source = {
        "kind": "sharegpt",
        **source,
        "filter": {"prompt": [4, 1024], "min_output": 4, "max_total": max_total},
    }
    return Draft(name, rows, choose_offer(options, has_times=False), source, notes=notes)


def passes(input_tokens: int, output_tokens: int, max_total: int) -> bool:
    """The usual serving filter."""
    return 4 <= input_tokens <= 1024 and output_tokens >= 4 and input_tokens + output_tokens <= max_total


def _tokenized(path: Path, options: WorkloadOptions, max_total: int) -> Iterator[TraceRow]:
    if not is_file(path):
        raise WorkloadError(f"no such file: {shown(str(path), 150)}; give --dataset a ShareGPT_V3 file.")
    if options.tokenize is None:
        raise WorkloadError(
            f"{shown(str(path), 150)} holds text, which needs a tokenizer; choose a model that has one."
        )
    conversations = list(read_sharegpt(path))
    for index in stream(options.seed, "sharegpt order").permutation(len(conversations)).tolist():
        conversation = conversations[index]
        # Tokenized one by one, as only as many as the workload needs are worth the time.
        prompt = tuple(options.tokenize(conversation.prompt))
        output_tokens = len(options.tokenize(conversation.answer))
        if passes(len(prompt), output_tokens, max_total):
            yield TraceRow(len(prompt), output_tokens, prompt=prompt)


FORMAT = Format(
    "sharegpt",
    lambda head: int(head.text.startswith("[")),
    OFFER_OPTIONS,
    lambda path, options: draft_file(path.name, path, options),
)
