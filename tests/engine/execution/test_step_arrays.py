"""Every field has its own part of the flat arrays, the same on both sides of a copy."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from backbench.engine.execution.step_arrays import StepArrays, StepSizes

FLOATS = {"temperature", "top_p", "min_p"}
SIZES = st.builds(StepSizes, st.integers(1, 50), st.integers(1, 20), st.integers(1, 30), st.integers(1, 60))


@given(SIZES)
def test_fields_fill_the_arrays_without_overlap(sizes: StepSizes) -> None:
    lengths = StepArrays.lengths(sizes)
    host = StepArrays.over(np.zeros(lengths[0], np.int64), np.zeros(lengths[1], np.float32), sizes)
    names = [entry.name for entry in fields(StepArrays)]
    for number, name in enumerate(names, start=1):
        getattr(host, name)[:] += number
    for number, name in enumerate(names, start=1):
        assert (getattr(host, name) == number).all(), name
        assert (getattr(host, name).dtype == np.float32) == (name in FLOATS)
    assert sum(len(getattr(host, name)) for name in names) == sum(lengths)


@given(SIZES)
def test_one_copy_of_each_array_brings_every_field(sizes: StepSizes) -> None:
    lengths = StepArrays.lengths(sizes)
    integers, floats = torch.arange(lengths[0]), torch.arange(lengths[1], dtype=torch.float32)
    host = StepArrays.over(integers.numpy(), floats.numpy(), sizes)
    device = StepArrays.over(integers.clone(), floats.clone(), sizes)
    for entry in fields(StepArrays):
        assert getattr(device, entry.name).tolist() == getattr(host, entry.name).tolist()


def test_lengths_of_fields() -> None:
    sizes = StepSizes(tokens=7, seqs=3, updates=5, samples=6)
    arrays = StepArrays.over(torch.zeros(200, dtype=torch.int64), torch.zeros(18), sizes)
    assert len(arrays.ids) == len(arrays.slot_mapping) == 7
    assert len(arrays.query_start) == 4
    assert len(arrays.rows) == len(arrays.copy_targets) == 3
    assert len(arrays.logits_indices) == len(arrays.top_p) == 6
    assert len(arrays.update_blocks) == 5
