"""The inputs of a step as named views of two flat arrays, on the host and on the device alike.

All that a step needs travels in those two, so one copy brings it to a device, and any other reader that
knows the four sizes finds every field at the same place.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any, Generic, TypeVar, get_args, get_type_hints

import numpy as np
import torch
from torch import Tensor

Flat = TypeVar("Flat", np.ndarray, Tensor)

ALIGNMENT_BYTES = 64
"""Of the f32 array behind the i64 one, for kernels that load vectors."""
FLOATS = "floats"
"""Marks the fields of the f32 array; the others are of the i64 array."""


@dataclass(frozen=True)
class StepSizes:
    """How much of each kind the largest step has."""

    tokens: int
    seqs: int
    updates: int
    """Block table entries."""
    samples: int
    """Tokens drawn from."""

    @property
    def bounds(self) -> int:
        """Boundaries of sequences."""
        return self.seqs + 1


@dataclass(frozen=True)
class StepArrays(Generic[Flat]):
    """A step's inputs. Each field is as long as `StepSizes` allows; a step uses the front of it."""

    ids: Annotated[Flat, "tokens"]
    """Token ids; -1 - row stands for the token sampled last in that row of the request tables."""
    positions: Annotated[Flat, "tokens"]
    slot_mapping: Annotated[Flat, "tokens"]
    """Where a token's K and V go, block * block_size + offset; -1 = nowhere."""
    query_start: Annotated[Flat, "bounds"]
    """Sequence s has tokens query_start[s] to query_start[s + 1]."""
    seq_lens: Annotated[Flat, "seqs"]
    """Keys each sequence has once its tokens are written."""
    rows: Annotated[Flat, "seqs"]
    """Each sequence's row of the request tables."""
    logits_indices: Annotated[Flat, "samples"]
    """Tokens whose logits are sampled from. The fields below have an entry for each of them."""
    logits_seqs: Annotated[Flat, "samples"]
    """The sequence each belongs to."""
    logits_rows: Annotated[Flat, "samples"]
    """The row each belongs to."""
    noise_keys: Annotated[Flat, "samples"]
    forced: Annotated[Flat, "samples"]
    """The token to take instead of the sampled one; -1 = the sampled one."""
    top_k: Annotated[Flat, "samples"]
    temperature: Annotated[Flat, "samples", FLOATS]
    top_p: Annotated[Flat, "samples", FLOATS]
    min_p: Annotated[Flat, "samples", FLOATS]
    update_rows: Annotated[Flat, "updates"]
    """Entries of the block table to change, each named once: their rows, columns and new blocks."""
    update_columns: Annotated[Flat, "updates"]
    update_blocks: Annotated[Flat, "updates"]
    copy_sources: Annotated[Flat, "seqs"]
    """Blocks to copy before the step writes, and where to."""
    copy_targets: Annotated[Flat, "seqs"]

    @classmethod
    def lengths(cls, sizes: StepSizes) -> tuple[int, int]:
        """Elements of the i64 array and of the f32 array that `over` takes."""
        lengths = [0, 0]
        for _, size, floats in _layout(sizes):
            lengths[floats] += size
        return lengths[0], lengths[1]

    @classmethod
    def over(cls, integers: Flat, floats: Flat, sizes: StepSizes) -> StepArrays[Flat]:
        """The fields one after the other in `integers` i64[...] and `floats` f32[...]."""
        views: dict[str, Any] = {}
        starts = [0, 0]
        for name, size, is_float in _layout(sizes):
            start = starts[is_float]
            views[name] = (floats if is_float else integers)[start : start + size]
            starts[is_float] += size
        return cls(**views)


def num_bytes(sizes: StepSizes) -> int:
    """Memory that holds both arrays."""
    integers, floats = StepArrays.lengths(sizes)
    return _start_of_floats(integers) + 4 * floats


def arrays_in(memory: Tensor, sizes: StepSizes) -> tuple[Tensor, Tensor]:
    """The i64 and the f32 array as views of u8 memory: one copy brings both to a device."""
    integers, _ = StepArrays.lengths(sizes)
    floats = memory[_start_of_floats(integers) :]
    return memory[: 8 * integers].view(torch.int64), floats.view(torch.float32)


def _start_of_floats(integers: int) -> int:
    return -(-8 * integers // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _layout(sizes: StepSizes) -> list[tuple[str, int, bool]]:
    """(field, elements, whether it is of floats), in order."""
    hints = get_type_hints(StepArrays, include_extras=True)
    layout = []
    for entry in fields(StepArrays):
        _, per, *rest = get_args(hints[entry.name])
        layout.append((entry.name, getattr(sizes, per), FLOATS in rest))
    return layout
