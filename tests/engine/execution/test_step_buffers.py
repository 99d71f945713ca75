"""Step buffers hold exactly what the plan says, padded inertly."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backbench.backends.noise import noise_key
from backbench.engine.execution.step_buffers import StepBuffers, StepInputs
from backbench.engine.execution.step_shape import StepShape
from backbench.engine.request import SamplingParams
from backbench.engine.scheduling.blocks import BlockPool
from backbench.engine.scheduling.scheduler import Scheduler, StepPlan
from backbench.engine.scheduling.sequence import Sequence

SIZE = 4


def setup() -> tuple[Scheduler, StepBuffers, np.ndarray]:
    scheduler = Scheduler(BlockPool(32, SIZE), max_seqs=4, max_step_tokens=16)
    table = np.zeros((scheduler.num_rows + 1, 8), dtype=np.int32)
    return scheduler, StepBuffers(20, 4, table, SIZE, torch.device("cpu")), table


def apply(plan: StepPlan, table: np.ndarray) -> None:
    for entry, block in plan.table_updates.items():
        table[entry] = block


def land(scheduler: Scheduler, plan: StepPlan, token: int) -> None:
    for part in plan.slices:
        scheduler.land(part, token if part.samples else None)


def decoding(scheduler: Scheduler, table: np.ndarray) -> Sequence:
    """A sequence of three prompt tokens whose next step decodes token 9."""
    sequence = Sequence("a", 0, [1, 2, 3], SamplingParams(max_tokens=4), 0)
    scheduler.add(sequence)
    plan = scheduler.schedule()
    apply(plan, table)
    land(scheduler, plan, token=9)
    return sequence


def test_a_prefill_and_a_decode_padded() -> None:
    scheduler, buffers, table = setup()
    first = Sequence("a", 0, [10, 11, 12, 13, 14], SamplingParams(max_tokens=4), 0)
    scheduler.add(first)
    plan = scheduler.schedule()
    apply(plan, table)
    inputs = buffers.fill(plan)
    buffers.upload()
    device_table, last = torch.zeros(9, 8, dtype=torch.int32), torch.zeros(9, dtype=torch.int64)
    ids, positions = buffers.unpack(inputs, device_table, last)
    batch = buffers.batch(inputs)
    assert ids.tolist() == [10, 11, 12, 13, 14]
    assert positions.tolist() == [0, 1, 2, 3, 4]
    assert batch.query_start.tolist() == [0, 5]
    assert (inputs.max_query, inputs.max_len, inputs.shape) == (5, 5, StepShape(0, 1, 5))
    blocks = first.blocks
    assert batch.slots.tolist() == [blocks[i // SIZE] * SIZE + i % SIZE for i in range(5)]
    assert batch.block_table[0, :2].tolist() == blocks
    land(scheduler, plan, token=99)

    # The next step decodes it, the token not read yet by the host, and prefills another; padded to 4 rows.
    second = Sequence("b", 0, [20, 21, 22], SamplingParams(max_tokens=2, temperature=1.0, seed=5), 1)
    scheduler.add(second)
    first.token_ids.pop()
    last[first.row] = 77
    plan = scheduler.schedule()
    apply(plan, table)
    inputs = buffers.fill(plan, StepShape(1, 3, 7))
    buffers.upload()
    ids, positions = buffers.unpack(inputs, device_table, last)
    batch = buffers.batch(inputs)
    assert ids.tolist() == [77, 20, 21, 22, 0, 0, 0, 0]
    assert positions.tolist()[:4] == [5, 0, 1, 2]
    assert batch.query_start.tolist() == [0, 1, 4, 4, 4]
    assert batch.seq_lens.tolist() == [6, 3, 0, 0]
    assert batch.slots.tolist()[4:] == [-1] * 4
    assert (batch.num_decodes, batch.max_query) == (1, 7), "a captured step's bound is its shape's"
    assert batch.block_table[0, :2].tolist() == first.blocks
    sampling = buffers.sampling(inputs)
    assert inputs.num_samples == 4
    assert not sampling.all_greedy and not sampling.any_filter
    assert sampling.temperature.tolist() == [0, 1, 0, 0]
    assert sampling.noise_key.tolist()[1] == noise_key(5, 0)
    assert buffers.on_device["sample_tokens"][:2].tolist() == [0, 3]
    assert buffers.on_device["sample_rows"][:4].tolist() == [first.row, second.row, 8, 8]


def test_prompts_follow_the_padded_decodes() -> None:
    """One decode laid out for two: the prompt's rows and tokens start at two, and so does its sample."""
    scheduler, buffers, table = setup()
    first = decoding(scheduler, table)
    second = Sequence("b", 0, [4, 5], SamplingParams(max_tokens=4), 1)
    scheduler.add(second)
    plan = scheduler.schedule()
    apply(plan, table)
    # What an earlier step left in the buffers must not show.
    for host in buffers._views:
        for values in host.values():
            values[:] = 7
    shape = StepShape(2, 2, 6)
    inputs = buffers.fill(plan, shape)
    buffers.upload()
    ids, positions = buffers.unpack(inputs, torch.from_numpy(table), torch.zeros(9, dtype=torch.int64))
    batch = buffers.batch(inputs)
    assert ids.tolist() == [9, 0, 4, 5, 0, 0, 0, 0]
    assert positions.tolist() == [3, 0, 0, 1, 0, 0, 0, 0]
    assert batch.query_start.tolist() == [0, 1, 2, 4, 4]
    assert batch.seq_lens.tolist() == [4, 0, 2, 0]
    assert [slot >= 0 for slot in batch.slots.tolist()] == [True, False, True, True, *[False] * 4]
    assert (batch.num_seqs, batch.num_tokens, batch.num_decodes) == (4, 8, 2)
    assert batch.block_table[0, 0] == first.blocks[0]
    assert batch.block_table[2, 0] == second.blocks[0]
    assert inputs.num_samples == 4
    wanted = buffers.wanted(inputs, batch)
    assert wanted.tokens.tolist() == [0, 3, 0, 0]
    assert wanted.batch.seq_lens.tolist() == [4, 2, 4, 4]
    assert buffers.on_device["sample_rows"][:4].tolist() == [first.row, second.row, 8, 8]


def live_part(buffers: StepBuffers, plan: StepPlan, captured: StepShape | None, table: np.ndarray) -> Any:
    """What a step computes, wherever it is laid out: ids, positions, slots, blocks of each row; samples."""
    inputs = buffers.fill(plan, captured)
    buffers.upload()
    ids, positions = buffers.unpack(inputs, torch.from_numpy(table), torch.arange(len(table)))
    batch = buffers.batch(inputs)
    assert batch.query_start[batch.num_decodes] == batch.num_decodes
    rows = []
    for row, length in enumerate(batch.seq_lens.tolist()):
        tokens = slice(*batch.query_start[row : row + 2].tolist())
        if length == 0:
            assert (batch.slots[tokens] == -1).all()
            continue
        blocks = batch.block_table[row, : -(-length // SIZE)]
        rows.append([part.tolist() for part in (ids[tokens], positions[tokens], batch.slots[tokens], blocks)])
    sampled_rows = buffers.on_device["sample_rows"][: inputs.num_samples]
    live = sampled_rows != buffers.dummy_row
    sampled_ids = ids[buffers.on_device["sample_tokens"][: inputs.num_samples]]
    return rows, sampled_rows[live].tolist(), sampled_ids[live].tolist(), int((batch.slots >= 0).sum())


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_padding_moves_slices_and_changes_nothing_in_them(data: st.DataObject) -> None:
    scheduler = Scheduler(BlockPool(64, SIZE), max_seqs=6, max_step_tokens=16)
    table = np.zeros((scheduler.num_rows + 1, 8), dtype=np.int32)
    tight, padded = (StepBuffers(60, 20, table, SIZE, torch.device("cpu")) for _ in range(2))
    for order in range(data.draw(st.integers(2, 6))):
        prompt = data.draw(st.lists(st.integers(0, 99), min_size=1, max_size=20))
        scheduler.add(Sequence(str(order), 0, prompt, SamplingParams(max_tokens=6), order))
        plan = scheduler.schedule()
        apply(plan, table)
        live, more = plan.shape, st.integers(0, 5)
        room = (data.draw(more), data.draw(more)) if live.prompts else (0, 0)
        shape = StepShape(
            live.decodes + data.draw(more), live.prompts + room[0], live.prompt_tokens + room[1]
        )
        found = live_part(padded, plan, shape, table)
        assert found == live_part(tight, plan, None, table)
        assert found[-1] == plan.num_tokens
        land(scheduler, plan, token=data.draw(st.integers(0, 99)))


def test_a_captured_shape_starts_inert() -> None:
    _, buffers, _ = setup()
    shape = StepShape(2, 2, 6)
    buffers.fill_inert(shape)
    buffers.upload()
    inputs = StepInputs(shape)
    buffers.unpack(inputs, torch.zeros(9, 8, dtype=torch.int32), torch.zeros(9, dtype=torch.int64))
    batch = buffers.batch(inputs)
    assert batch.query_start.tolist() == [0, 1, 2, 2, 2]
    assert batch.seq_lens.tolist() == [0] * 4
    assert batch.slots.tolist() == [-1] * 8


def test_wanted_tokens_are_decodes_of_the_sequences_that_sample() -> None:
    """A prompt in two chunks between a whole one and a decode: the first chunk samples nothing."""
    scheduler, buffers, table = setup()
    first = decoding(scheduler, table)
    whole = Sequence("b", 0, [4, 5], SamplingParams(max_tokens=4), 1)
    chunked = Sequence("c", 0, list(range(20)), SamplingParams(max_tokens=4), 2)
    scheduler.add(whole)
    scheduler.add(chunked)
    plan = scheduler.schedule()
    apply(plan, table)
    assert [part.samples for part in plan.slices] == [True, True, False]
    inputs = buffers.fill(plan)
    buffers.upload()
    buffers.unpack(inputs, torch.from_numpy(table), torch.zeros(9, dtype=torch.int64))
    batch = buffers.batch(inputs)
    wanted = buffers.wanted(inputs, batch)
    assert wanted.tokens.tolist() == [0, 2]
    assert wanted.batch.seq_lens.tolist() == [4, 2]
    assert wanted.batch.query_start.tolist() == [0, 1, 2]
    assert (wanted.batch.num_seqs, wanted.batch.num_tokens, wanted.batch.num_decodes) == (2, 2, 2)
    for row, sequence in enumerate((first, whole)):
        assert wanted.batch.block_table[row].tolist() == batch.block_table[row].tolist()
        assert wanted.batch.block_table[row, 0] == sequence.blocks[0]
    # A graph of exactly this shape samples three rows all the same: the third one inertly.
    inputs = buffers.fill(plan, plan.shape)
    buffers.upload()
    assert inputs.num_samples == 3
    assert buffers.on_device["sample_rows"][:3].tolist() == [first.row, whole.row, buffers.dummy_row]
    assert buffers.sampling(inputs).temperature.tolist() == [0, 0, 0]


def test_alternate_host_buffers_keep_the_previous_step() -> None:
    scheduler, buffers, table = setup()
    scheduler.add(Sequence("a", 0, [1, 2, 3], SamplingParams(max_tokens=4), 0))
    plan = scheduler.schedule()
    apply(plan, table)
    buffers.fill(plan)
    turn = buffers._turn
    land(scheduler, plan, 5)
    plan = scheduler.schedule()
    apply(plan, table)
    buffers.fill(plan)
    assert buffers._views[turn]["ids"][:3].tolist() == [1, 2, 3]
    assert buffers._views[turn ^ 1]["ids"][0] == 5
