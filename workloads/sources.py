"""Where a workload's rows come from: one function a kind, each giving a Draft."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from backbench.errors import WorkloadError, shown
from backbench.workloads.draft import SYNTHETIC_NOTE, Draft, draft_trace, think_times_ns
from backbench.workloads.lengths import parse_lengths
from backbench.workloads.options import WorkloadOptions, choose_offer
from backbench.workloads.packed import packed_azure, packed_mooncake, packed_sharegpt_lengths
from backbench.workloads.readers.mooncake import TICK_NS
from backbench.workloads.readers.sharegpt import DEFAULT_REQUESTS, draft_conversations, draft_file, passes
from backbench.workloads.streams import stream
from backbench.workloads.trace import Follow, Segment, TraceRow

DEFAULT_INPUT = "lognormal:256:0.6:1024"
DEFAULT_OUTPUT = "lognormal:128:0.6:512"


def synthetic(options: WorkloadOptions) -> Draft:
    """Drawn lengths; optionally shared prefixes and sessions. Streams keep each of them independent."""
    count = options.num_requests or DEFAULT_REQUESTS
    specs = (options.input_lengths or DEFAULT_INPUT, options.output_lengths or DEFAULT_OUTPUT)
    inputs = parse_lengths(specs[0]).sample(stream(options.seed, "input lengths"), count)
    outputs = parse_lengths(specs[1]).sample(stream(options.seed, "output lengths"), count)
    groups, prefix_tokens = _parse_prefix(options.shared_prefix)
    session_groups = stream(options.seed, "prefix groups").integers(max(groups, 1), size=count).tolist()
    think_ns = think_times_ns(options, count)
    rows: list[TraceRow] = []
    for index, (session, turn) in enumerate(_places(options, count)):
        prefix = (Segment("prefix", session_groups[session], prefix_tokens),) if groups else ()
        row = TraceRow(prefix_tokens + inputs[index], outputs[index], segments=prefix)
        if options.turns is not None:
            row = replace(row, session=str(session), key=f"row {index}")
        if turn > 0:
            before = rows[-1]
            assert before.key is not None
            context_tokens = before.input_tokens + before.output_tokens
            follow = Follow(before.key, think_ns[index], before.key, context_tokens)
            row = replace(row, input_tokens=context_tokens + inputs[index], segments=(), follow=follow)
        rows.append(row)
    source: dict[str, Any] = {"kind": "synthetic", "input_lengths": specs[0], "output_lengths": specs[1]}
    source |= {"turns": options.turns, "shared_prefix": options.shared_prefix}
    if options.think_ms is not None:
        source["think_ms"] = options.think_ms
    offer = choose_offer(options, has_times=False)
    return Draft("synthetic", rows, offer, source, notes=("synthetic lengths and tokens.",))


def _places(options: WorkloadOptions, count: int) -> Iterator[tuple[int, int]]:
    """(session, turn) of the first `count` rows, both from 0: session by session, the last one may be cut."""
    spec = options.turns or "fixed:1"
    turns = parse_lengths(spec).sample(stream(options.seed, "turns"), count)
    every = ((session, turn) for session, many in enumerate(turns) for turn in range(many))
    return itertools.islice(every, count)


def _parse_prefix(spec: str | None) -> tuple[int, int]:
    if spec is None:
        return 0, 0
    match = re.fullmatch(r"([1-9]\d{0,8})x([1-9]\d{0,8})", spec, re.ASCII)
    if match is None:
        raise WorkloadError(f"shared prefix {shown(spec)} is malformed; write GROUPSxTOKENS, e.g. 8x512.")
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
            f"{shown(name)} is malformed; write batch:REQUESTSxINPUT+OUTPUT, e.g. batch:64x1024+129."
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
    """Real text from `--dataset`, or the packed lengths, in an order drawn from the seed."""
    if options.dataset is not None:
        return draft_file(name, Path(options.dataset), options)
    if options.turns is not None:
        raise WorkloadError(
            "sharegpt without a file knows the lengths of first turns only; give --dataset FILE, or leave "
            "out --turns."
        )
    return draft_conversations(
        name,
        lambda max_total: _packed_conversations(options.seed, max_total),
        {"data": "packed lengths"},
        options,
        notes=(SYNTHETIC_NOTE,),
    )


def _packed_conversations(seed: int, max_total: int) -> Iterator[TraceRow]:
    lengths = packed_sharegpt_lengths()
    order = stream(seed, "sharegpt order").permutation(len(lengths))
    for input_tokens, output_tokens in lengths[order].tolist():
        if passes(input_tokens, output_tokens, max_total):
            yield TraceRow(input_tokens, output_tokens)


def packed_azure_trace(name: str, options: WorkloadOptions) -> Draft:
    """`azure-conv` or `azure-code`."""
    return _packed_trace(name, packed_azure(name), options)


def packed_mooncake_trace(name: str, options: WorkloadOptions) -> Draft:
    """`mooncake`, recorded on ticks."""
    return _packed_trace(name, packed_mooncake(), options, TICK_NS)


def _packed_trace(
    name: str, rows: Iterator[TraceRow], options: WorkloadOptions, tick_ns: int | None = None
) -> Draft:
    count = options.num_requests or DEFAULT_REQUESTS
    source = {"kind": name, "data": "packed trace"}
    return draft_trace(name, rows, source, options, count=count, tick_ns=tick_ns)
