"""From rows to requests: scale, clip or refuse, time, fill with tokens, hash."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from backbench.errors import WorkloadError
from backbench.workloads import transform
from backbench.workloads.draft import Draft
from backbench.workloads.options import Offer, WorkloadOptions
from backbench.workloads.request import Request, Workload, earliest_ns
from backbench.workloads.streams import stream
from backbench.workloads.tokens import TokenSource, content_hash
from backbench.workloads.trace import LATEST_NS, TraceRow

LONGEST_UNASKED_NS = 24 * 3600 * 1_000_000_000
"""A longer schedule is a mistake more often than a wish."""
SESSIONS_NOTE = (
    "a later turn is sent its think time after the answer before it ended, and its prompt holds that answer "
    "as the target gave it; recorded or drawn tokens stand for it where the target tells none."
)


@dataclass(frozen=True)
class _Turn:
    """What a row follows, by position."""

    follows: int | None = None
    think_ns: int | None = None
    """None = its arrival decides."""
    extends: int | None = None
    kept_tokens: int = 0


def realise(draft: Draft, options: WorkloadOptions) -> Workload:
    """The workload. WorkloadError when a request does not fit the context or the vocabulary."""
    rows, transformations = _transformed(draft, options)
    turns = _turns(rows)
    arrivals_ns = _arrivals_ns(draft.offer, rows, turns, options.seed)
    _require_in_time(arrivals_ns, turns, options)
    requests = _requests(draft, rows, turns, arrivals_ns, options)
    parameters = {
        "source": draft.source,
        "seed": options.seed,
        "num_requests": len(requests),
        "vocab_size": options.vocab_size,
        "max_len": options.max_len,
        "offered": draft.offer.parameters(),
        "transformations": transformations,
    }
    later = sum(turn.follows is not None for turn in turns)
    if later:
        parameters["sessions"] = {"begun": len(rows) - later, "later_turns": later}
    return Workload(
        name=draft.name,
        requests=requests,
        concurrency=draft.offer.concurrency,
        parameters=parameters,
        content_hash=content_hash(requests),
        notes=(*draft.notes, SESSIONS_NOTE) if later else draft.notes,
    )


def _transformed(draft: Draft, options: WorkloadOptions) -> tuple[list[TraceRow], list[dict[str, Any]]]:
    """The rows as they are sent, and the records of all that was done to them."""
    rows, records = draft.rows, list(draft.transformations)
    if options.length_scale is not None:
        rows, record = transform.scale_lengths(rows, options.length_scale)
        records.append(record)
    if options.max_len is not None:
        if draft.clip if options.clip is None else options.clip:
            rows, record = transform.clip_lengths(rows, options.max_len)
            records.append(record)
        _require_fit(rows, options.max_len)
    _require_vocabulary(rows, options.vocab_size)
    if draft.offer.time_scale is not None:
        scaled, record = transform.scale_time(rows, draft.offer.time_scale)
        rows = list(scaled)
        records.append(record)
    if options.rate_scale is not None:
        scaled, record = transform.scale_rate(rows, options.rate_scale)
        rows = list(scaled)
        records.append(record)
    if options.think_scale is not None:
        scaled, record = transform.scale_think(rows, options.think_scale)
        rows = list(scaled)
        records.append(record)
    return rows, records


def _turns(rows: list[TraceRow]) -> list[_Turn]:
    """Who follows whom. A turn whose predecessor is not among the rows before it waits for nobody."""
    places: dict[str, int] = {}
    turns: list[_Turn] = []
    for index, row in enumerate(rows):
        turn = _Turn()
        if row.follow is not None and row.follow.row in places:
            extends = places.get(row.follow.context) if row.follow.kept_tokens else None
            kept_tokens = 0 if extends is None else row.follow.kept_tokens
            turn = _Turn(places[row.follow.row], row.follow.think_ns, extends, kept_tokens)
        turns.append(turn)
        if row.key is not None:
            places[row.key] = index
    return turns


def _arrivals_ns(offer: Offer, rows: list[TraceRow], turns: list[_Turn], seed: int) -> list[int]:
    """An arrival process begins sessions: it times what follows nothing, and answers time the rest."""
    heads = [index for index, turn in enumerate(turns) if turn.follows is None]
    if offer.arrivals is not None:
        arrivals_ns = [0] * len(rows)
        times = offer.arrivals.times_ns(stream(seed, "arrivals"), len(heads))
        for index, time_ns in zip(heads, times, strict=True):
            arrivals_ns[index] = time_ns
        return arrivals_ns
    if offer.mode != "trace":
        return [0] * len(rows)
    return [row.arrival_ns if turn.think_ns is None else 0 for row, turn in zip(rows, turns, strict=True)]


def _require_in_time(arrivals_ns: list[int], turns: list[_Turn], options: WorkloadOptions) -> None:
    times = zip(arrivals_ns, turns, strict=True)
    due_ns = earliest_ns((at, turn.follows, turn.think_ns or 0) for at, turn in times)
    for index, time_ns in enumerate(due_ns):
        if time_ns >= LATEST_NS:
            raise WorkloadError(
                f"request {index} arrives more than 146 years after the start; check the trace's times and "
                "--time-scale."
            )
    latest_ns = max(due_ns)
    if latest_ns > LONGEST_UNASKED_NS and not options.yes:
        days = latest_ns / LONGEST_UNASKED_NS
        raise WorkloadError(
            f"the last request would be sent after {days:,.1f} days; shorten silences with --max-gap, choose "
            "a --window or a --time-scale, or go on with --yes."
        )


def _requests(
    draft: Draft,
    rows: list[TraceRow],
    turns: list[_Turn],
    arrivals_ns: list[int],
    options: WorkloadOptions,
) -> tuple[Request, ...]:
    source = TokenSource(options.seed, options.vocab_size)
    seeds = stream(options.seed, "sampling").integers(2**31, size=len(rows)).tolist()
    made: list[Request] = []
    for index, (row, turn) in enumerate(zip(rows, turns, strict=True)):
        context: tuple[int, ...] = ()
        if turn.extends is not None:
            answer = source.answer(turn.extends, rows[turn.extends])
            context = (made[turn.extends].prompt + answer)[: turn.kept_tokens]
        prompt = source.prompt(index, row, context)
        made.append(
            Request(
                id=index,
                arrival_ns=arrivals_ns[index],
                prompt=prompt,
                output_tokens=row.output_tokens,
                session=row.session,
                temperature=_temperature(options, row, draft),
                seed=seeds[index] if row.seed is None else row.seed,
                follows=turn.follows,
                think_ns=turn.think_ns or 0,
                extends=turn.extends,
                kept_tokens=min(len(context), len(prompt)),
            )
        )
    return tuple(made)


def _temperature(options: WorkloadOptions, row: TraceRow, draft: Draft) -> float:
    if options.temperature is not None:
        return options.temperature
    return draft.temperature if row.temperature is None else row.temperature


def _require_fit(rows: list[TraceRow], max_len: int) -> None:
    for index, row in enumerate(rows):
        if row.input_tokens + row.output_tokens > max_len:
            raise WorkloadError(
                f"request {index} has {row.input_tokens} prompt + {row.output_tokens} output tokens, more "
                f"than the model's context of {max_len}; choose shorter lengths, a model with a longer "
                "context, or --clip."
            )


def _require_vocabulary(rows: list[TraceRow], vocab_size: int) -> None:
    for index, row in enumerate(rows):
        for tokens in (row.prompt, row.answer):
            if tokens and not 0 <= min(tokens) <= max(tokens) < vocab_size:
                raise WorkloadError(
                    f"request {index} has token id {max(tokens)}, outside the model's vocabulary of "
                    f"{vocab_size}; tokenize with the model's own tokenizer."
                )
