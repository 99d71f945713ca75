"""A step read from the board is the step that was written."""

from __future__ import annotations

import os

import numpy as np
import torch
from engine_fixtures import make_limits

from backbench.engine.execution.step_buffers import StepInputs
from backbench.engine.execution.step_shape import StepShape
from backbench.engine.parallel.board import FACTS, SLOTS, Board


def test_every_fact_and_every_number_arrives() -> None:
    memory = os.memfd_create("test")
    ours, theirs = Board(memory, make_limits(), (60, 9)), Board(memory, make_limits(), (60, 9))
    inputs = StepInputs(StepShape(2, 1, 7))
    for number, name in enumerate(FACTS, start=3):
        kind = type(getattr(inputs, name))
        setattr(inputs, name, kind(number))
    integers, floats = np.arange(50, dtype=np.int64) - 7, np.linspace(-1, 1, 9, dtype=np.float32)
    for slot, more in enumerate((None, torch.arange(12).reshape(3, 4))):
        inputs.more_updates = more
        ours.write(slot, inputs, slot == 1, integers, floats)
        read = theirs.read(slot)
        assert read.captured == (slot == 1)
        assert read.inputs.shape == inputs.shape
        assert {name: getattr(read.inputs, name) for name in FACTS} == {
            name: getattr(inputs, name) for name in FACTS
        }
        assert np.array_equal(read.integers, integers) and np.array_equal(read.floats, floats)
        assert (read.inputs.more_updates is None) == (more is None)
        if more is not None:
            assert read.inputs.more_updates is not None
            assert torch.equal(read.inputs.more_updates, more)
    os.close(memory)


def test_slots_are_apart() -> None:
    memory = os.memfd_create("test")
    board = Board(memory, make_limits(), (60, 9))
    floats = np.zeros(1, dtype=np.float32)
    for slot in range(SLOTS):
        board.write(slot, StepInputs(StepShape(slot)), False, np.full(3, slot), floats)
    for slot in range(SLOTS):
        read = board.read(slot)
        assert read.inputs.shape == StepShape(slot) and read.integers.tolist() == [slot] * 3
    os.close(memory)
