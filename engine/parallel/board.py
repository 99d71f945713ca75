"""Steps as they travel between ranks: the flat arrays of `StepArrays` and a header, in memory all map.

Slots are used in turn. A step in flight keeps its slot until every rank has launched it, and no more steps
are in flight than half the slots: a slot that is written has been read.
"""

from __future__ import annotations

import mmap
import os
from typing import NamedTuple

import numpy as np
import torch

from backbench.engine.config import MOST_STAGES
from backbench.engine.execution.step_buffers import StepInputs
from backbench.engine.execution.step_shape import StepShape
from backbench.engine.limits import EngineLimits

SLOTS = 2 * MOST_STAGES
FACTS = tuple(name for name in StepInputs.__slots__ if name not in ("shape", "more_updates"))
"""Whole numbers and truth values of `StepInputs`."""
SHAPE = len(StepShape._fields)
HEADER = 4 + SHAPE + len(FACTS)
"""Captured or not, three lengths, the shape, the facts."""
WORD = np.dtype(np.int64).itemsize


class Travelling(NamedTuple):
    """A step as it is read from a slot; the arrays are views of it."""

    inputs: StepInputs
    captured: bool
    integers: np.ndarray
    floats: np.ndarray


class Board:
    """The slots, sized for the largest step within the engine's limits."""

    def __init__(self, memory: int, limits: EngineLimits, largest_step: tuple[int, int]) -> None:
        """memory: a descriptor of memory, which is made large enough. largest_step: see `Runner`."""
        self._integers, self._floats = largest_step
        self._updates = (limits.num_rows + 1) * limits.blocks_per_seq
        """Entries of the whole block table, which no update exceeds."""
        self._slot = HEADER + self._integers + 3 * self._updates + -(-self._floats // 2)
        size = SLOTS * self._slot * WORD
        if os.fstat(memory).st_size < size:
            os.ftruncate(memory, size)
        self._map = mmap.mmap(memory, size)
        self._words = np.frombuffer(self._map, dtype=np.int64).reshape(SLOTS, self._slot)

    def write(
        self, slot: int, inputs: StepInputs, captured: bool, integers: np.ndarray, floats: np.ndarray
    ) -> None:
        """Put a step into a slot."""
        words, more = self._words[slot], inputs.more_updates
        count = 0 if more is None else more.shape[1]
        facts = [getattr(inputs, name) for name in FACTS]
        words[:HEADER] = [captured, len(integers), len(floats), count, *inputs.shape, *facts]
        words[HEADER : HEADER + len(integers)] = integers
        start = HEADER + self._integers
        if more is not None:
            words[start : start + 3 * count] = more.numpy().reshape(-1)
        words[start + 3 * self._updates :].view(np.float32)[: len(floats)] = floats

    def read(self, slot: int) -> Travelling:
        """The step in a slot."""
        words = self._words[slot]
        captured, integers, floats, count, *rest = words[:HEADER].tolist()
        inputs = StepInputs(StepShape(*rest[:SHAPE]))
        for name, value in zip(FACTS, rest[SHAPE:], strict=True):
            setattr(inputs, name, type(getattr(inputs, name))(value))
        start = HEADER + self._integers
        if count:
            inputs.more_updates = torch.from_numpy(words[start : start + 3 * count].reshape(3, count).copy())
        return Travelling(
            inputs,
            bool(captured),
            words[HEADER : HEADER + integers],
            words[start + 3 * self._updates :].view(np.float32)[:floats],
        )
