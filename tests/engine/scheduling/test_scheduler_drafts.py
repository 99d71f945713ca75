"""Drafted tokens in a plan: only free blocks, nothing kept of what was not accepted, nobody preempted."""

from __future__ import annotations

from engine_fixtures import make_limits

from backbench.engine.request import SamplingParams
from backbench.engine.scheduling.blocks import BlockPool
from backbench.engine.scheduling.scheduler import Scheduler, Slice, StepPlan
from backbench.engine.scheduling.sequence import Sequence

SIZE = 4


def decoding(num_blocks: int, prompt: int = 3, max_tokens: int = 20) -> tuple[Scheduler, Sequence]:
    """A sequence that has its first output token."""
    scheduler = Scheduler(BlockPool(num_blocks, SIZE), make_limits(num_blocks=num_blocks))
    sequence = Sequence("a", 0, list(range(prompt)), SamplingParams(max_tokens=max_tokens), 0)
    scheduler.add(sequence)
    plan = scheduler.schedule()
    scheduler.land(plan.slices[0], 50)
    return scheduler, sequence


def drafted(scheduler: Scheduler, tokens: list[int]) -> tuple[StepPlan, Slice, int]:
    """The next step, in which the one sequence verifies as many of `tokens` as there is room for."""
    plan = scheduler.schedule()
    (part,) = plan.slices
    room = scheduler.reserve(plan, part, len(tokens))
    scheduler.extend(plan, part, tokens[:room])
    return plan, part, room


def test_accepted_tokens_stay_and_the_others_blocks_are_free_again() -> None:
    scheduler, sequence = decoding(8)
    plan, part, room = drafted(scheduler, [51, 52, 53, 54, 55, 56])
    assert room == 6 and (plan.num_tokens, plan.num_drafted) == (7, 6)
    assert (part.start, part.num_tokens, part.samples, part.draw) == (3, 7, 7, 1)
    assert len(sequence.blocks) == 3 and scheduler.pool.num_used == 3
    assert sequence.num_computed == 4 and sequence.num_tokens == 5, "what is sure"
    scheduler.accept(part, [51, 52])
    assert scheduler.land(part, 60)
    assert sequence.token_ids == [0, 1, 2, 50, 51, 52, 60]
    assert sequence.num_computed == sequence.num_landed == 6 and sequence.num_tokens == 7
    assert len(sequence.blocks) == 2 and scheduler.pool.num_used == 2
    assert sequence.num_published == 1
    scheduler.pool.check()


def test_nothing_accepted_is_a_plain_step() -> None:
    scheduler, sequence = decoding(8)
    _, part, _ = drafted(scheduler, [51, 52])
    scheduler.accept(part, [])
    scheduler.land(part, 60)
    assert sequence.token_ids == [0, 1, 2, 50, 60] and sequence.num_computed == 4
    assert sequence.num_published == 1 and len(sequence.blocks) == 1


def test_only_free_blocks_and_only_what_can_become_output() -> None:
    scheduler, _ = decoding(2)
    assert drafted(scheduler, [0] * 9)[2] == 4, "two blocks hold 8 tokens"
    scheduler, _ = decoding(8, max_tokens=4)
    assert drafted(scheduler, [0] * 9)[2] == 2, "of three more outputs the last is the target's own"
    scheduler, _ = decoding(8, max_tokens=2)
    plan, part, room = drafted(scheduler, [0] * 9)
    assert room == 0 and part.draft == () and plan.num_drafted == 0


def test_a_reservation_that_is_not_used_is_given_back() -> None:
    scheduler, sequence = decoding(8)
    plan = scheduler.schedule()
    assert scheduler.reserve(plan, plan.slices[0], 9) == 9
    assert len(sequence.blocks) == 4
    scheduler.extend(plan, plan.slices[0], [])
    assert len(sequence.blocks) == 1
    scheduler.pool.check()


def test_a_sequence_preempted_by_the_same_plan_drafts_nothing() -> None:
    scheduler, sequence = decoding(8)
    plan = scheduler.schedule()
    scheduler._preempt(sequence)
    assert scheduler.reserve(plan, plan.slices[0], 3) == 0
