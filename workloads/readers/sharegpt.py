"""ShareGPT files: conversations in one JSON array, or one a line, with from/value or role/content turns."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from backbench.errors import WorkloadError, shown
from backbench.workloads.draft import OFFER_OPTIONS, SESSION_OPTIONS, Draft, think_times_ns
from backbench.workloads.lengths import parse_lengths
from backbench.workloads.options import WorkloadOptions, choose_offer
from backbench.workloads.readers.format import Format, Head
from backbench.workloads.readers.json_array import read_objects
from backbench.workloads.readers.text import MAXIMUM_TOKENS, BadRows, Place, is_file
from backbench.workloads.streams import stream
from backbench.workloads.trace import Follow, TraceRow

DEFAULT_REQUESTS = 64
FIELDS = frozenset({"id", "conversations", "from", "value", "role", "content"})
PROMPT_ROLES = frozenset({"human", "user"})
ANSWER_ROLES = frozenset({"gpt", "assistant", "chatgpt", "bing", "bard"})


@dataclass(frozen=True)
class Conversation:
    """The first question that an answer follows, that answer, and the questions and answers right after."""

    prompt: str
    answer: str
    line: int
    later: tuple[tuple[str, str], ...] = ()


def read_sharegpt(path: Path, bad: BadRows | None = None, later: bool = False) -> Iterator[Conversation]:
    """The first human turn that a gpt turn follows, of every conversation with one; if `later`, more of it.

    Over a third of the real file's entries start with a gpt turn: taking turns 0 and 1 blindly would send an
    answer as the prompt. Raises WorkloadError naming file, line and field.
    """
    bad = bad or BadRows()
    for place, entry in read_objects(path, bad):
        with bad.row():
            if not isinstance(entry.get("conversations"), list):
                place.fail("conversations", "missing, or not a list of turns.")
            turns = [_turn(place, turn) for turn in entry["conversations"]]
            pairs = _pairs(turns)
            if pairs:
                for said in pairs[0]:
                    place.require_encodable("conversations.value", said)
                yield Conversation(*pairs[0], place.line, tuple(pairs[1:]) if later else ())


def _pairs(turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Questions with their answers, from the first one on as long as they take turns."""
    pairs: list[tuple[str, str]] = []
    start = 0
    while start + 1 < len(turns):
        (role, text), (next_role, next_text) = turns[start : start + 2]
        answered = role in PROMPT_ROLES and next_role in ANSWER_ROLES
        if answered:
            pairs.append((text, next_text))
        elif pairs:
            break
        start += 2 if answered else 1
    return pairs


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
    times = zip(rows, think_times_ns(options, len(rows)), strict=True)
    rows = [_thinking(row, think_ns) for row, think_ns in times]
    if max_total < 2048:
        notes = (*notes, f"conversations over the model's context of {max_total} tokens are left out.")
    source = {
        "kind": "sharegpt",
        **source,
        "filter": {"prompt": [4, 1024], "min_output": 4, "max_total": max_total},
    }
    if options.turns is not None:
        source |= {"turns": options.turns, "think_ms": options.think_ms}
    return Draft(name, rows, choose_offer(options, has_times=False), source, notes=notes)


def _thinking(row: TraceRow, think_ns: int) -> TraceRow:
    return row if row.follow is None else replace(row, follow=replace(row.follow, think_ns=think_ns))


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
    conversations = list(read_sharegpt(path, bad, later=options.turns is not None))
    spec = parse_lengths(options.turns or "fixed:1")
    turns = spec.sample(stream(options.seed, "turns"), len(conversations))
    for index in stream(options.seed, "sharegpt order").permutation(len(conversations)).tolist():
        conversation = conversations[index]
        # Tokenized one by one, as only as many as the workload needs are worth the time.
        prompt = tuple(options.tokenize(conversation.prompt))
        answer = tuple(options.tokenize(conversation.answer))
        if not passes(len(prompt), len(answer), max_total):
            continue
        row = TraceRow(len(prompt), len(answer), prompt=prompt)
        if options.turns is None:
            yield row
            continue
        row = replace(row, session=str(index), key=f"{index}/0", answer=answer)
        yield row
        later = conversation.later[: turns[index] - 1]
        for said in itertools.chain.from_iterable(later):
            Place(path, conversation.line).require_encodable("conversations.value", said)
        yield from _later_turns(row, later, options.tokenize, options.max_len or MAXIMUM_TOKENS)


def _later_turns(
    row: TraceRow,
    later: Iterable[tuple[str, str]],
    tokenize: Callable[[str], list[int]],
    longest: int,
) -> Iterator[TraceRow]:
    """The turns after the first, until one is empty or the session would be longer than `longest` tokens."""
    for number, (question, said) in enumerate(later, 1):
        prompt, answer = tuple(tokenize(question)), tuple(tokenize(said))
        context_tokens = row.input_tokens + row.output_tokens
        if not prompt or not answer or context_tokens + len(prompt) + len(answer) > longest:
            return
        assert row.key is not None
        row = TraceRow(
            input_tokens=context_tokens + len(prompt),
            output_tokens=len(answer),
            prompt=prompt,
            session=row.session,
            key=f"{row.session}/{number}",
            follow=Follow(row.key, 0, row.key, context_tokens),
            answer=answer,
        )
        yield row


def _recognise(head: Head) -> int:
    if "conversations" in head.names:
        return len(head.names & FIELDS)
    return int(head.text.startswith("[") and not head.names & {"messages", "prompt"})


FORMAT = Format(
    "sharegpt",
    _recognise,
    OFFER_OPTIONS | SESSION_OPTIONS | {"bad_rows"},
    lambda path, options: draft_file(path.name, path, options),
)
