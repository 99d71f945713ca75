"""Where a workload's rows come from: one function a kind, each giving a Draft."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from backbench.errors import WorkloadError
from backbench.workloads import transform
from backbench.workloads.lengths import parse_lengths
from backbench.workloads.options import WorkloadOptions, choose_offer
from backbench.workloads.packed import packed_azure, packed_mooncake, packed_sharegpt_lengths
from backbench.workloads.readers.azure import read_azure
from backbench.workloads.readers.burstgpt import read_burstgpt
from backbench.workloads.readers.mooncake import read_mooncake
from backbench.workloads.readers.openai import read_openai
from backbench.workloads.readers.qwen_bailian import read_qwen_bailian
from backbench.workloads.readers.sharegpt import read_sharegpt
from backbench.workloads.readers.tracelab import NOTE as TRACELAB_NOTE
from backbench.workloads.readers.tracelab import read_tracelab
from backbench.workloads.readers.vidur import read_vidur
from backbench.workloads.realise import Draft
from backbench.workloads.streams import stream
from backbench.workloads.trace import Segment, TraceRow

DEFAULT_REQUESTS = 64
MAXIMUM_FILE_REQUESTS = 100_000
"""A whole file up to this many rows is replayed without asking; more needs --num-requests."""
DEFAULT_INPUT = "lognormal:256:0.6:1024"
DEFAULT_OUTPUT = "lognormal:128:0.6:512"
SESSIONS_A_WAVE = 8
"""Turns of this many sessions are interleaved, so that a turn does not follow its predecessor at once."""
SYNTHETIC_NOTE = "synthetic tokens: the lengths are real, the text is not."

READERS: dict[str, Callable[[Path], Iterator[TraceRow]]] = {
    "azure": read_azure,
    "burstgpt": read_burstgpt,
    "mooncake": read_mooncake,
    "qwen-bailian": read_qwen_bailian,
    "tracelab": read_tracelab,
    "vidur": read_vidur,
}


def synthetic(options: WorkloadOptions) -> Draft:
    """Drawn lengths; optionally shared prefixes and sessions. Streams keep each of them independent."""
    count = options.num_requests or DEFAULT_REQUESTS
    specs = (options.input_lengths or DEFAULT_INPUT, options.output_lengths or DEFAULT_OUTPUT)
    inputs = parse_lengths(specs[0]).sample(stream(options.seed, "input lengths"), count)
    outputs = parse_lengths(specs[1]).sample(stream(options.seed, "output lengths"), count)
    turns = options.turns or 1
    groups, prefix_tokens = _parse_prefix(options.shared_prefix)
    session_groups = stream(options.seed, "prefix groups").integers(max(groups, 1), size=count).tolist()
    so_far: dict[int, int] = {}
    rows = []
    for index in range(count):
        wave, place = divmod(index, SESSIONS_A_WAVE * turns)
        session = wave * SESSIONS_A_WAVE + place % SESSIONS_A_WAVE if turns > 1 else index
        history_tokens = so_far.get(session, 0) + inputs[index]
        so_far[session] = history_tokens + outputs[index]
        segments = [Segment("prefix", session_groups[session], prefix_tokens)] if groups else []
        if turns > 1:
            segments.append(Segment(f"history/{session}", 0, history_tokens))
        rows.append(
            TraceRow(
                input_tokens=prefix_tokens + history_tokens,
                output_tokens=outputs[index],
                segments=tuple(segments),
                session=str(session) if turns > 1 else None,
            )
        )
    notes = ["synthetic lengths and tokens."]
    if turns > 1:
        notes.append("a turn repeats its session with drawn answers and does not wait for the one before.")
    source = {"kind": "synthetic", "input_lengths": specs[0], "output_lengths": specs[1], "turns": turns}
    source["shared_prefix"] = options.shared_prefix
    return Draft("synthetic", rows, choose_offer(options, has_times=False), source, notes=tuple(notes))


def _parse_prefix(spec: str | None) -> tuple[int, int]:
    if spec is None:
        return 0, 0
    match = re.fullmatch(r"([1-9]\d{0,8})x([1-9]\d{0,8})", spec, re.ASCII)
    if match is None:
        raise WorkloadError(f"shared prefix '{spec}' is malformed; write GROUPSxTOKENS, e.g. 8x512.")
    return int(match.group(1)), int(match.group(2))


def nano256(options: WorkloadOptions) -> Draft:
    """nano-vLLM's bench.py, draw for draw: `random.seed(0)`, then all prompts, then all output lengths."""
    draws = random.Random(options.seed)
    prompts = [[draws.randint(0, 10_000) for _ in range(draws.randint(100, 1024))] for _ in range(256)]
    outputs = [draws.randint(100, 1024) for _ in range(256)]
    count = options.num_requests or 256
    if count > 256:
        raise WorkloadError(f"nano256 has 256 requests, not {count}; lower --num-requests.")
    rows = [
        TraceRow(len(prompt), output, prompt=tuple(token % options.vocab_size for token in prompt))
        for prompt, output in zip(prompts[:count], outputs[:count], strict=True)
    ]
    notes = ["nano-vLLM's bench.py."]
    if options.vocab_size <= 10_000:
        notes.append(f"token ids 0..10000 are taken modulo the vocabulary of {options.vocab_size}.")
    offer = choose_offer(options, has_times=False, all_at_once=True)
    return Draft("nano256", rows, offer, {"kind": "nano256"}, notes=tuple(notes), temperature=0.6)


def batch(name: str, options: WorkloadOptions) -> Draft:
    """`batch:64x1024+129`: 64 random prompts of 1024 tokens and 129 output tokens, all at once."""
    match = re.fullmatch(r"batch:([1-9]\d{0,5})x([1-9]\d{0,6})\+([1-9]\d{0,6})", name, re.ASCII)
    if match is None:
        raise WorkloadError(
            f"'{name}' is malformed; write batch:REQUESTSxINPUT+OUTPUT, e.g. batch:64x1024+129."
        )
    count, input_tokens, output_tokens = (int(part) for part in match.groups())
    rows = [TraceRow(input_tokens, output_tokens)] * count
    source = {
        "kind": "batch",
        "requests": count,
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
    }
    offer = choose_offer(options, has_times=False, all_at_once=True)
    return Draft(name, rows, offer, source, notes=("synthetic lengths and tokens.",))


def sharegpt(name: str, options: WorkloadOptions) -> Draft:
    """Packed lengths, or a ShareGPT_V3 file's text, in an order drawn from the seed.

    The usual serving filter keeps prompts of 4..1024 tokens, outputs of at least 4, and at most 2048 tokens
    (or the model's context, if that is less) together.
    """
    count = options.num_requests or DEFAULT_REQUESTS
    max_total = min(2048, options.max_len or 2048)
    kept: Iterator[TraceRow]
    source: dict[str, Any] = {"kind": "sharegpt"}
    notes: tuple[str, ...] = ()
    if options.dataset is None:
        kept = _packed_conversations(options.seed, max_total)
        source["data"] = "packed lengths"
        notes = (SYNTHETIC_NOTE,)
    else:
        kept = _text_conversations(Path(options.dataset), options, max_total)
        source["data"] = Path(options.dataset).name
    rows = list(itertools.islice(kept, count))
    if len(rows) < count:
        raise WorkloadError(
            f"only {len(rows)} conversations pass the filter (at most {max_total} tokens together), not "
            f"{count}; lower --num-requests."
        )
    if max_total < 2048:
        notes = (*notes, f"conversations over the model's context of {max_total} tokens are left out.")
    source["filter"] = {"prompt": [4, 1024], "min_output": 4, "max_total": max_total}
    return Draft(name, rows, choose_offer(options, has_times=False), source, notes=notes)


def _passes(input_tokens: int, output_tokens: int, max_total: int) -> bool:
    return 4 <= input_tokens <= 1024 and output_tokens >= 4 and input_tokens + output_tokens <= max_total


def _packed_conversations(seed: int, max_total: int) -> Iterator[TraceRow]:
    lengths = packed_sharegpt_lengths()
    order = stream(seed, "sharegpt order").permutation(len(lengths))
    for input_tokens, output_tokens in lengths[order].tolist():
        if _passes(input_tokens, output_tokens, max_total):
            yield TraceRow(input_tokens, output_tokens)


def _text_conversations(path: Path, options: WorkloadOptions, max_total: int) -> Iterator[TraceRow]:
    if not path.is_file():
        raise WorkloadError(f"no such file: '{path}'; give --dataset a ShareGPT_V3 file.")
    if options.tokenize is None:
        raise WorkloadError(f"'{path}' holds text, which needs a tokenizer; choose a model that has one.")
    conversations = list(read_sharegpt(path))
    for index in stream(options.seed, "sharegpt order").permutation(len(conversations)).tolist():
        conversation = conversations[index]
        # Tokenized one by one, as only as many as the workload needs are worth the time.
        prompt = tuple(options.tokenize(conversation.prompt))
        output_tokens = len(options.tokenize(conversation.answer))
        if _passes(len(prompt), output_tokens, max_total):
            yield TraceRow(len(prompt), output_tokens, prompt=prompt)


def packed_trace(name: str, options: WorkloadOptions) -> Draft:
    """`azure-conv`, `azure-code` or `mooncake`."""
    rows = packed_mooncake() if name == "mooncake" else packed_azure(name)
    source = {"kind": name, "data": "packed trace"}
    return _trace(name, rows, source, options, options.num_requests or DEFAULT_REQUESTS, name == "mooncake")


def trace_file(path: Path, format_name: str, options: WorkloadOptions) -> Draft:
    """A trace of lengths in one of the READERS' formats."""
    rows = READERS[format_name](path)
    source = {"kind": format_name, "data": path.name}
    return _trace(path.name, rows, source, options, options.num_requests, format_name == "mooncake")


def _trace(
    name: str,
    rows: Iterable[TraceRow],
    source: dict[str, Any],
    options: WorkloadOptions,
    count: int | None,
    ticks: bool,
) -> Draft:
    """Transformed and cut to `count` (None: all). Order: ticks, window, sampling, sessions, count."""
    records = []
    if ticks:
        source["tick"] = options.tick or "spread"
        if source["tick"] == "spread":
            rows, record = transform.spread_ticks(rows, options.seed)
            records.append(record)
    if options.window_s is not None:
        rows, record = transform.window(rows, *options.window_s)
        records.append(record)
    if options.sample is not None:
        rows, record = transform.sample(rows, options.sample, options.seed)
        records.append(record)
    if options.sessions is not None:
        rows, record = transform.limit_sessions(rows, options.sessions)
        records.append(record)
    chosen = _cut(name, rows, count)
    offer = choose_offer(options, has_times=True)
    notes = (SYNTHETIC_NOTE, TRACELAB_NOTE) if source["kind"] == "tracelab" else (SYNTHETIC_NOTE,)
    return Draft(name, chosen, offer, source, records, notes, clip=True)


def _cut(name: str, rows: Iterable[TraceRow], count: int | None) -> list[TraceRow]:
    chosen = list(itertools.islice(rows, MAXIMUM_FILE_REQUESTS + 1 if count is None else count))
    if count is None and len(chosen) > MAXIMUM_FILE_REQUESTS:
        raise WorkloadError(
            f"'{name}' has more than {MAXIMUM_FILE_REQUESTS:,} requests; give --num-requests."
        )
    if not chosen:
        raise WorkloadError(f"'{name}' has no request left to send; check the file, --window and --sample.")
    if count is not None and len(chosen) < count:
        raise WorkloadError(f"'{name}' has {len(chosen)} requests, not {count}; lower --num-requests.")
    return chosen


def openai_file(path: Path, options: WorkloadOptions) -> Draft:
    """A user's own log of request bodies."""
    found = read_openai(path, options.tokenize)
    wanted = MAXIMUM_FILE_REQUESTS + 1 if options.num_requests is None else options.num_requests
    pairs = list(itertools.islice(found, wanted))
    timed = [has_time for _, has_time in pairs]
    if any(timed) and not all(timed):
        raise WorkloadError(f"'{path}' has a timestamp on some requests only; give all or none of them one.")
    rows = _cut(path.name, (row for row, _ in pairs), options.num_requests)
    offer = choose_offer(options, has_times=all(timed))
    return Draft(path.name, rows, offer, {"kind": "openai", "data": path.name})
