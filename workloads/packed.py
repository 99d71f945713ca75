"""The traces that ship with the project: small arrays in workloads/data, decoded as they are needed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from backbench.errors import WorkloadError
from backbench.workloads.readers.mooncake import BLOCK_TOKENS
from backbench.workloads.trace import TraceRow

DATA = Path(__file__).parent / "data"


def packed_azure(name: str) -> Iterator[TraceRow]:
    """`azure-conv` (19,366 rows) or `azure-code` (8,819 rows); times exact to the recorded 100 ns."""
    arrays = _load(name)
    arrivals_ns = np.cumsum(arrays["gap_100ns"], dtype=np.int64) * 100
    columns = (arrays["input_tokens"].tolist(), arrays["output_tokens"].tolist(), arrivals_ns.tolist())
    for input_tokens, output_tokens, arrival_ns in zip(*columns, strict=True):
        yield TraceRow(input_tokens, output_tokens, arrival_ns)


def packed_mooncake() -> Iterator[TraceRow]:
    """The Mooncake conversation trace (12,031 rows), times on its 3 s ticks, block ids as published."""
    arrays = _load("mooncake")
    arrivals_ns = np.cumsum(arrays["tick_ms"], dtype=np.int64) * 1_000_000
    names = ("input_tokens", "output_tokens", "known_tail")
    columns = [arrivals_ns.tolist(), *(arrays[name].tolist() for name in names)]
    parents: list[int] = []
    for arrival_ns, input_tokens, output_tokens, tail in zip(*columns, strict=True):
        known = []
        while tail != -1:
            known.append(tail)
            tail = parents[tail]
        known.reverse()
        new = range(len(parents), len(parents) + -(-input_tokens // BLOCK_TOKENS) - len(known))
        ids = (*known, *new)
        parents.extend([-1, *ids][len(known) : -1])
        yield TraceRow(input_tokens, output_tokens, arrival_ns, block_ids=ids, block_tokens=BLOCK_TOKENS)


def packed_sharegpt_lengths() -> NDArray[np.int64]:
    """[30731, 2]: prompt and output tokens of ShareGPT conversations (Llama-2 tokenizer), unfiltered."""
    arrays = _load("sharegpt-lengths")
    return np.stack([arrays["input_tokens"], arrays["output_tokens"]], axis=1).astype(np.int64)


def _load(name: str) -> dict[str, NDArray[np.generic]]:
    path = DATA / f"{name}.npz"
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError) as error:
        raise WorkloadError(
            f"packed trace '{path}' cannot be read ({error}); reinstall the package."
        ) from None
