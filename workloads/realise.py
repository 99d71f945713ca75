"""From rows to requests: clip or refuse, time, fill with tokens, hash."""

from __future__ import annotations

from backbench.errors import WorkloadError
from backbench.workloads.draft import Draft
from backbench.workloads.options import Offer, WorkloadOptions
from backbench.workloads.request import Request, Workload
from backbench.workloads.streams import stream
from backbench.workloads.tokens import TokenSource, content_hash
from backbench.workloads.trace import LATEST_NS, TraceRow
from backbench.workloads.transform import clip_lengths, scale_time

LONGEST_UNASKED_NS = 24 * 3600 * 1_000_000_000
"""A longer schedule is a mistake more often than a wish."""


def realise(draft: Draft, options: WorkloadOptions) -> Workload:
    """The workload. WorkloadError when a request does not fit the context or the vocabulary."""
    transformations = list(draft.transformations)
    rows = draft.rows
    if options.max_len is not None:
        if draft.clip if options.clip is None else options.clip:
            rows, record = clip_lengths(rows, options.max_len)
            transformations.append(record)
        _require_fit(rows, options.max_len)
    _require_vocabulary(rows, options.vocab_size)
    if draft.offer.time_scale is not None:
        scaled, record = scale_time(rows, draft.offer.time_scale)
        rows = list(scaled)
        transformations.append(record)
    arrivals_ns = _arrivals_ns(draft.offer, rows, options.seed)
    _require_short(max(arrivals_ns), options)
    source = TokenSource(options.seed, options.vocab_size)
    seeds = stream(options.seed, "sampling").integers(2**31, size=len(rows)).tolist()
    requests = tuple(
        Request(
            id=index,
            arrival_ns=arrivals_ns[index],
            prompt=source.prompt(index, row),
            output_tokens=row.output_tokens,
            session=row.session,
            temperature=_temperature(options, row, draft),
            seed=seeds[index] if row.seed is None else row.seed,
        )
        for index, row in enumerate(rows)
    )
    parameters = {
        "source": draft.source,
        "seed": options.seed,
        "num_requests": len(requests),
        "vocab_size": options.vocab_size,
        "max_len": options.max_len,
        "offered": draft.offer.parameters(),
        "transformations": transformations,
    }
    return Workload(
        name=draft.name,
        requests=requests,
        concurrency=draft.offer.concurrency,
        parameters=parameters,
        content_hash=content_hash(requests),
        notes=draft.notes,
    )


def _arrivals_ns(offer: Offer, rows: list[TraceRow], seed: int) -> list[int]:
    if offer.arrivals is not None:
        return offer.arrivals.times_ns(stream(seed, "arrivals"), len(rows))
    if offer.mode != "trace":
        return [0] * len(rows)
    for index, row in enumerate(rows):
        if row.arrival_ns >= LATEST_NS:
            raise WorkloadError(
                f"request {index} arrives more than 146 years after the start; check the trace's times and "
                "--time-scale."
            )
    return [row.arrival_ns for row in rows]


def _require_short(latest_ns: int, options: WorkloadOptions) -> None:
    if latest_ns > LONGEST_UNASKED_NS and not options.yes:
        days = latest_ns / LONGEST_UNASKED_NS
        raise WorkloadError(
            f"the last request would be sent after {days:,.1f} days; shorten silences with --max-gap, choose "
            "a --window or a --time-scale, or go on with --yes."
        )


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
        if row.prompt and not 0 <= min(row.prompt) <= max(row.prompt) < vocab_size:
            raise WorkloadError(
                f"request {index} has token id {max(row.prompt)}, outside the model's vocabulary of "
                f"{vocab_size}; tokenize with the model's own tokenizer."
            )
