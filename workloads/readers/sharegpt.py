"""ShareGPT files: conversations in one JSON array, or one a line, with from/value or role/content turns."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from backbench.errors import WorkloadError, shown
from backbench.workloads.draft import OFFER_OPTIONS, Draft
from backbench.workloads.options import WorkloadOptions, choose_offer
from backbench.workloads.readers.format import Format, Head
from backbench.workloads.readers.json_array import read_objects
from backbench.workloads.readers.text import BadRows, Place, is_file
from backbench.workloads.streams import stream
from backbench.workloads.trace import TraceRow

DEFAULT_REQUESTS = 64
FIELDS = frozenset({"id", "conversations", "from", "value", "role", "content"})
PROMPT_ROLES = frozenset({"human", "user"})
ANSWER_ROLES = frozenset({"gpt", "assistant", "chatgpt", "bing", "bard"})


@dataclass(frozen=True)
class Conversation:
    """The first question and its answer."""

    prompt: str
    answer: str
    line: int


def read_sharegpt(path: Path, bad: BadRows | None = None) -> Iterator[Conversation]:
    """The first human turn that a gpt turn follows, of every conversation that has one.

    Over a third of the real file's entries start with a gpt turn: taking turns 0 and 1 blindly would send an
    answer as the prompt. Raises WorkloadError naming file, line and field.
    """
    bad = bad or BadRows()
    for place, entry in read_objects(path, bad):
        with bad.row():
            if not isinstance(entry.get("conversations"), list):
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
    role, text = ("from", "value") if "role" not in turn else ("role", "content")
    for field in (role, text):
        if not isinstance(turn.get(field), str):
            place.fail(f"conversations.{field}", "missing, or not a string.")
    return turn[role], turn[text]


def draft_file(name: str, path: Path, options: WorkloadOptions) -> Draft:
    """A file's conversations in an order drawn from the seed, under the name `name`."""
    bad = BadRows(skip=options.bad_rows == "skip")
    draft = draft_conversations(
        name,
        lambda max_total: _tokenized(path, options, max_total, bad),
        {"data": path.name},
        options,
        whole=True,
    )
    return replace(draft, source=draft.source | bad.record())


def draft_conversations(
    name: str,
    kept: Callable[[int], Iterator[TraceRow]],
    source: dict[str, Any],
    options: WorkloadOptions,
    notes: tuple[str, ...] = (),
    whole: bool = False,
) -> Draft:
    """The first conversations that `kept` yields, given the most tokens that one may have together.

    `whole`: where no number is asked for, a source that has fewer than the usual number gives all it has.

    The usual serving filter keeps prompts of 4..1024 tokens, outputs of at least 4, and at most 2048 tokens
    (or the model's context, if that is less) together.
    """
    count = options.num_requests or DEFAULT_REQUESTS
    max_total = min(2048, options.max_len or 2048)
    rows = list(itertools.islice(kept(max_total), count))
    if len(rows) < count and not (whole and rows and options.num_requests is None):
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


def _tokenized(path: Path, options: WorkloadOptions, max_total: int, bad: BadRows) -> Iterator[TraceRow]:
    if not is_file(path):
        raise WorkloadError(f"no such file: {shown(str(path), 150)}; give --dataset a ShareGPT_V3 file.")
    if options.tokenize is None:
        raise WorkloadError(
            f"{shown(str(path), 150)} holds text, which needs a tokenizer; choose a model that has one."
        )
    conversations = list(read_sharegpt(path, bad))
    for index in stream(options.seed, "sharegpt order").permutation(len(conversations)).tolist():
        conversation = conversations[index]
        # Tokenized one by one, as only as many as the workload needs are worth the time.
        prompt = tuple(options.tokenize(conversation.prompt))
        output_tokens = len(options.tokenize(conversation.answer))
        if passes(len(prompt), output_tokens, max_total):
            yield TraceRow(len(prompt), output_tokens, prompt=prompt)


def _recognise(head: Head) -> int:
    if "conversations" in head.names:
        return len(head.names & FIELDS)
    return int(head.text.startswith("[") and not head.names & {"messages", "prompt"})


FORMAT = Format(
    "sharegpt",
    _recognise,
    OFFER_OPTIONS | {"bad_rows"},
    lambda path, options: draft_file(path.name, path, options),
)
