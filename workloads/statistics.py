"""What a workload is like, without running it: arrivals, prefixes, lengths."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from backbench.errors import WorkloadError
from backbench.workloads.request import Request
from backbench.workloads.trace import TraceRow


@dataclass(frozen=True)
class LengthSummary:
    """Of a set of lengths, in tokens; percentiles are numpy's linear ones."""

    count: int
    mean: float
    std: float
    minimum: int
    p50: float
    p90: float
    p99: float
    maximum: int


def summarise_lengths(lengths: Sequence[int]) -> LengthSummary:
    """Summary of at least one length."""
    if not lengths:
        raise WorkloadError("there is no request to summarise.")
    values = np.asarray(lengths, dtype=np.float64)
    p50, p90, p99 = np.percentile(values, [50, 90, 99]).tolist()
    return LengthSummary(
        len(lengths), float(values.mean()), float(values.std()), min(lengths), p50, p90, p99, max(lengths)
    )


def gap_cv(arrivals_ns: Sequence[int]) -> float | None:
    """Coefficient of variation of the gaps between arrivals; 1 for Poisson, 0 for constant.

    None with fewer than two gaps, or where all arrive at once.
    """
    gaps = np.diff(np.sort(np.asarray(arrivals_ns, dtype=np.int64)))
    if len(gaps) < 2 or gaps.sum() == 0:
        return None
    return float(gaps.std() / gaps.mean())


def ideal_prefix_hit_ratio(
    prompts: Iterable[Sequence[int]], block_size: int, answered: Iterable[int] = ()
) -> float:
    """Share of prompt tokens that a prefix cache of unlimited size would hold, prompts in order.

    Whole blocks only, and never the one that ends with a prompt's last token, whose logits give the first
    output. `answered` (see `answered_tokens`): how many first tokens of each prompt an earlier answer left in
    the cache; without it, what the outputs of earlier requests would add is not counted.
    """
    if block_size < 1:
        raise WorkloadError(f"the block size must be at least 1 token, not {block_size}.")
    children: dict[tuple[int, bytes], int] = {}
    hit_tokens = total_tokens = 0
    for prompt, cached in zip(prompts, itertools.chain(answered, itertools.repeat(0)), strict=False):
        tokens = np.asarray(prompt, dtype="<i4")
        total_tokens += len(tokens)
        node, known = 0, True
        hits = 0
        for start in range(0, len(tokens) - block_size + 1, block_size):
            key = (node, tokens[start : start + block_size].tobytes())
            known = known and (key in children or start + block_size <= cached)
            hits += block_size if known and start + block_size < len(tokens) else 0
            node = children.setdefault(key, len(children) + 1)
        hit_tokens += hits
    return hit_tokens / total_tokens if total_tokens else 0.0


def answered_tokens(requests: Sequence[Request]) -> list[int]:
    """Of each prompt, the first tokens that are in the cache once the turn before has been answered.

    From the plan: an answer of the length asked for leaves its context there but for its last token, which is
    never computed with; that holds whichever tokens it has.
    """
    found = []
    for request in requests:
        cached = 0
        if request.extends is not None:
            before = requests[request.extends]
            cached = min(request.kept_tokens, len(before.prompt) + before.output_tokens - 1)
        found.append(cached)
    return found


def block_reuse_ratio(rows: Iterable[TraceRow]) -> float:
    """Share of a trace's block ids that an earlier row has had; blocks of a row are chained."""
    seen: set[int] = set()
    reused = total = 0
    for row in rows:
        total += len(row.block_ids)
        reused += sum(1 for block_id in row.block_ids if block_id in seen)
        seen.update(row.block_ids)
    return reused / total if total else 0.0


def ks_distance(first: Sequence[float], second: Sequence[float]) -> float:
    """Kolmogorov-Smirnov distance of two samples: the largest gap between their distribution functions."""
    if not len(first) or not len(second):
        raise WorkloadError("both samples need at least one value.")
    a, b = np.sort(np.asarray(first)), np.sort(np.asarray(second))
    values = np.concatenate([a, b])
    below_a = np.searchsorted(a, values, side="right") / len(a)
    below_b = np.searchsorted(b, values, side="right") / len(b)
    return float(np.abs(below_a - below_b).max())


def histogram(lengths: Sequence[int], bins: int = 12) -> list[tuple[int, int, int]]:
    """Lengths as (least, most, how many), ends included; ever wider bins where they span a factor of 20."""
    if not lengths:
        raise WorkloadError("there is no request to summarise.")
    least, most = min(lengths), max(lengths)
    spaced = np.geomspace if least > 0 and most >= 20 * least else np.linspace
    edges = np.unique(np.round(spaced(least, most + 1, bins + 1)).astype(np.int64))
    edges[0], edges[-1] = least, most + 1
    counts, _ = np.histogram(np.asarray(lengths), edges)
    ends = zip(edges[:-1].tolist(), (edges[1:] - 1).tolist(), counts.tolist(), strict=True)
    return list(ends)


def arrival_counts(arrivals_ns: Sequence[int], bins: int = 60) -> tuple[float, list[int]]:
    """Width in s of equal bins from the first arrival to the last, and how many arrive in each."""
    times = np.asarray(arrivals_ns, dtype=np.int64)
    span_ns = int(times.max() - times.min()) if len(times) else 0
    if span_ns == 0:
        return 0.0, [len(times)]
    places = np.minimum((times - times.min()) * bins // span_ns, bins - 1)
    return span_ns / bins / 1e9, np.bincount(places, minlength=bins).tolist()
