"""Step buffers hold exactly what the plan says, padded inertly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_fixtures import make_limits
from hypothesis import given, settings
from hypothesis import strategies as st
from late_device import LateQueue

from backbench.backends.noise import noise_key
from backbench.engine.execution.device_queue import DeviceQueue
from backbench.engine.execution.step_buffers import RequestTables, StepBuffers, StepInputs
from backbench.engine.execution.step_shape import StepShape
from backbench.engine.limits import EngineLimits
from backbench.engine.request import SamplingParams
from backbench.engine.scheduling.blocks import BlockPool
from backbench.engine.scheduling.scheduler import Scheduler, StepPlan
from backbench.engine.scheduling.sequence import Sequence

SIZE = 4
CPU = torch.device("cpu")


def make_buffers(limits: EngineLimits, queue: DeviceQueue | None = None) -> StepBuffers:
    return StepBuffers(limits, RequestTables(limits, CPU), CPU, queue or DeviceQueue(CPU))


def setup() -> tuple[Scheduler, StepBuffers]:
    limits = make_limits()
    return Scheduler(BlockPool(32, SIZE), limits), make_buffers(limits)


def unpack(buffers: StepBuffers, inputs: StepInputs) -> tuple[list[int], list[int]]:
    """Token ids and positions, as the device sees them."""
    buffers.upload(inputs)
    ids, positions = buffers.unpack(inputs)
    return ids.tolist(), positions.tolist()


def land(scheduler: Scheduler, plan: StepPlan, token: int) -> None:
    for part in plan.slices:
        scheduler.land(part, token if part.samples else None)


def decoding(scheduler: Scheduler, buffers: StepBuffers) -> Sequence:
    """A sequence of three prompt tokens whose next step decodes token 9."""
    sequence = Sequence("a", 0, [1, 2, 3], SamplingParams(max_tokens=4), 0)
    scheduler.add(sequence)
    plan = scheduler.schedule()
    unpack(buffers, buffers.fill(plan))
    land(scheduler, plan, token=9)
    return sequence


def test_a_prefill_and_a_decode_padded() -> None:
    scheduler, buffers = setup()
    first = Sequence("a", 0, [10, 11, 12, 13, 14], SamplingParams(max_tokens=4), 0)
    scheduler.add(first)
    plan = scheduler.schedule()
    inputs = buffers.fill(plan)
    ids, positions = unpack(buffers, inputs)
    batch = buffers.batch(inputs)
    assert ids == [10, 11, 12, 13, 14]
    assert positions == [0, 1, 2, 3, 4]
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
    buffers.tables.last_tokens[first.row] = 77
    plan = scheduler.schedule()
    inputs = buffers.fill(plan, StepShape(1, 3, 7))
    ids, positions = unpack(buffers, inputs)
    batch = buffers.batch(inputs)
    assert ids == [77, 20, 21, 22, 0, 0, 0, 0]
    assert positions[:4] == [5, 0, 1, 2]
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
    assert buffers.on_device.logits_indices[:2].tolist() == [0, 3]
    assert buffers.on_device.logits_rows[:4].tolist() == [first.row, second.row, 8, 8]


def test_prompts_follow_the_padded_decodes() -> None:
    """One decode laid out for two: the prompt's rows and tokens start at two, and so does its sample."""
    scheduler, buffers = setup()
    first = decoding(scheduler, buffers)
    second = Sequence("b", 0, [4, 5], SamplingParams(max_tokens=4), 1)
    scheduler.add(second)
    plan = scheduler.schedule()
    # What an earlier step left in the buffers must not show.
    for staging in buffers._stagings:
        staging.integers.fill_(7)
        staging.floats.fill_(7)
    shape = StepShape(2, 2, 6)
    inputs = buffers.fill(plan, shape)
    ids, positions = unpack(buffers, inputs)
    batch = buffers.batch(inputs)
    assert ids == [9, 0, 4, 5, 0, 0, 0, 0]
    assert positions == [3, 0, 0, 1, 0, 0, 0, 0]
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
    assert buffers.on_device.logits_rows[:4].tolist() == [first.row, second.row, 8, 8]


def live_part(buffers: StepBuffers, plan: StepPlan, captured: StepShape | None) -> Any:
    """What a step computes, wherever it is laid out: ids, positions, slots, blocks of each row; samples."""
    inputs = buffers.fill(plan, captured)
    buffers.upload(inputs)
    ids, positions = buffers.unpack(inputs)
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
    sampled_rows = buffers.on_device.logits_rows[: inputs.num_samples]
    live = sampled_rows != buffers.tables.padding_row
    sampled_ids = ids[buffers.on_device.logits_indices[: inputs.num_samples]]
    return rows, sampled_rows[live].tolist(), sampled_ids[live].tolist(), int((batch.slots >= 0).sum())


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_padding_moves_slices_and_changes_nothing_in_them(data: st.DataObject) -> None:
    scheduler = Scheduler(BlockPool(64, SIZE), make_limits(max_seqs=6, num_blocks=64))
    tight, padded = (make_buffers(make_limits(max_seqs=20, max_step_tokens=40)) for _ in range(2))
    for buffers in (tight, padded):
        buffers.tables.last_tokens.copy_(torch.arange(41))
    for order in range(data.draw(st.integers(2, 6))):
        prompt = data.draw(st.lists(st.integers(0, 99), min_size=1, max_size=20))
        scheduler.add(Sequence(str(order), 0, prompt, SamplingParams(max_tokens=6), order))
        plan = scheduler.schedule()
        live, more = plan.shape, st.integers(0, 5)
        room = (data.draw(more), data.draw(more)) if live.prompts else (0, 0)
        shape = StepShape(
            live.decodes + data.draw(more), live.prompts + room[0], live.prompt_tokens + room[1]
        )
        found = live_part(padded, plan, shape)
        assert found == live_part(tight, plan, None)
        assert found[-1] == plan.num_tokens
        land(scheduler, plan, token=data.draw(st.integers(0, 99)))


def test_drafts_as_prompts_and_as_decodes() -> None:
    """The same tokens, positions, slots, keys and draws, in one row a sequence or in one a token."""
    limits = make_limits(draft_tokens=3)
    scheduler, buffers = Scheduler(BlockPool(32, SIZE), limits), make_buffers(limits)
    decoding(scheduler, buffers)
    plan = scheduler.schedule()
    assert scheduler.reserve(plan, plan.slices[0], 2) == 2
    scheduler.extend(plan, plan.slices[0], [7, 8])
    together = live_part(buffers, plan, None)
    assert together == live_part(buffers, plan, StepShape(0, 2, 6, 4))
    rows, _, sampled_ids, _ = together
    assert rows[0][:2] == [[9, 7, 8], [3, 4, 5]] and sampled_ids == [9, 7, 8]
    apart = live_part(buffers, plan, StepShape(4))
    assert [row[0] for row in apart[0]] == [[9], [7], [8]]
    assert [row[2] for row in apart[0]] == [[slot] for slot in rows[0][2]]
    assert apart[1:] == together[1:]
    assert buffers._seq_lens[:4].tolist() == [4, 5, 6, 0]
    inputs = buffers.fill(plan, StepShape(4))
    assert inputs.context_tokens == 6, "its keys are counted once"


def test_a_captured_shape_starts_inert() -> None:
    _, buffers = setup()
    shape = StepShape(2, 2, 6)
    inputs = buffers.fill_inert(shape)
    unpack(buffers, inputs)
    batch = buffers.batch(inputs)
    assert batch.query_start.tolist() == [0, 1, 2, 2, 2]
    assert batch.seq_lens.tolist() == [0] * 4
    assert batch.slots.tolist() == [-1] * 8


def test_wanted_tokens_are_decodes_of_the_sequences_that_sample() -> None:
    """A prompt in two chunks between a whole one and a decode: the first chunk samples nothing."""
    scheduler, buffers = setup()
    first = decoding(scheduler, buffers)
    whole = Sequence("b", 0, [4, 5], SamplingParams(max_tokens=4), 1)
    chunked = Sequence("c", 0, list(range(20)), SamplingParams(max_tokens=4), 2)
    scheduler.add(whole)
    scheduler.add(chunked)
    plan = scheduler.schedule()
    assert [part.samples for part in plan.slices] == [True, True, False]
    inputs = buffers.fill(plan)
    unpack(buffers, inputs)
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
    buffers.upload(inputs)
    assert inputs.num_samples == 3
    assert buffers.on_device.logits_rows[:3].tolist() == [first.row, whole.row, buffers.tables.padding_row]
    assert buffers.sampling(inputs).temperature.tolist() == [0, 0, 0]


def test_a_device_that_is_late_finds_every_step_as_it_was_filled() -> None:
    """Steps that sample nothing may run far ahead of the device: no upload reads a later step's inputs."""
    queue = LateQueue()
    buffers = make_buffers(make_limits(), queue)
    scheduler = Scheduler(BlockPool(32, SIZE), make_limits(prefill_chunk=2))
    scheduler.add(Sequence("a", 0, list(range(10, 20)), SamplingParams(max_tokens=4), 0))
    seen: list[list[int]] = []
    for _ in range(5):
        plan = scheduler.schedule()
        buffers.upload(buffers.fill(plan))
        queue.submit(lambda: seen.append(buffers.on_device.ids[:2].tolist()))
        land(scheduler, plan, 5)
    queue.mark().synchronize()
    assert seen == [[10, 11], [12, 13], [14, 15], [16, 17], [18, 19]]


def test_more_updates_than_the_buffers_hold_come_beside_them() -> None:
    scheduler, buffers = setup()
    decoding(scheduler, buffers)
    plan = scheduler.schedule()
    plan.table_updates |= {(7, column): column + 1 for column in range(buffers.tables.blocks.shape[1])}
    plan.table_updates |= {(6, column): column + 9 for column in range(buffers.tables.blocks.shape[1])}
    assert len(plan.table_updates) > buffers.max_updates
    unpack(buffers, buffers.fill(plan))
    assert buffers.tables.blocks.tolist() == buffers.tables.host_blocks.tolist()
    assert buffers.tables.blocks[7].tolist() == list(range(1, 9))


def test_copies_of_blocks_travel_with_the_step() -> None:
    scheduler, buffers = setup()
    decoding(scheduler, buffers)
    plan = scheduler.schedule()
    plan.copies = [(3, 9), (4, 8)]
    inputs = buffers.fill(plan)
    buffers.upload(inputs)
    assert [blocks.tolist() for blocks in buffers.copies(inputs)] == [[3, 4], [9, 8]]


@pytest.mark.parametrize("filters", [{"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}, {}], ids=str)
def test_each_filter_alone_is_applied(filters: dict[str, Any]) -> None:
    scheduler, buffers = setup()
    scheduler.add(Sequence("a", 0, [1, 2, 3], SamplingParams(temperature=1.0, **filters), 0))
    inputs = buffers.fill(scheduler.schedule())
    buffers.upload(inputs)
    sampling = buffers.sampling(inputs)
    assert sampling.any_filter == bool(filters)
    for name, default in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)):
        assert getattr(sampling, name).tolist() == pytest.approx([filters.get(name, default)])
