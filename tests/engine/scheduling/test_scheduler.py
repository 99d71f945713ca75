"""The scheduler under random traffic: references add up, nobody starves, no shared block is written."""

from __future__ import annotations

from collections import deque

from engine_fixtures import make_limits
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from backbench.engine.request import SamplingParams
from backbench.engine.scheduling.blocks import BlockPool
from backbench.engine.scheduling.scheduler import Scheduler, StepPlan
from backbench.engine.scheduling.sequence import Sequence


def make(prompt: list[int], max_tokens: int = 4, order: int = 0, name: str = "r") -> Sequence:
    return Sequence(f"{name}{order}", 0, prompt, SamplingParams(max_tokens=max_tokens), order)


def scheduler(num_blocks: int = 32, size: int = 4, **limits: int) -> Scheduler:
    return Scheduler(BlockPool(num_blocks, size), make_limits(**limits))


def land(engine: Scheduler, plan: StepPlan, token: int = 7) -> None:
    """Land a plan whose every sample is `token`, finishing by length as the engine does."""
    for part in plan.slices:
        sequence = part.sequence
        counts = engine.land(part, token if part.samples else None)
        if counts and len(sequence.token_ids) >= sequence.end_len:
            engine.finish(sequence, "length")


def shape(plan: StepPlan) -> list[tuple[str, int, int]]:
    return [(part.sequence.request_id, part.start, part.num_tokens) for part in plan.slices]


def test_prompts_are_chunked_by_the_budget_and_decodes_come_first() -> None:
    s = scheduler()
    s.add(make(list(range(20)), order=0))
    s.add(make([1, 2], order=1))
    plan = s.schedule()
    assert shape(plan) == [("r0", 0, 16)]
    land(s, plan)
    plan = s.schedule()
    assert shape(plan) == [("r0", 16, 4), ("r1", 0, 2)]
    land(s, plan)
    plan = s.schedule()
    assert plan.num_decodes == 2 and plan.num_tokens == 2


def test_a_small_budget_keeps_no_decode_waiting() -> None:
    s = scheduler(max_step_tokens=2)
    for order in range(4):
        s.add(make([1], max_tokens=9, order=order))
    land(s, s.schedule())
    land(s, s.schedule())
    plan = s.schedule()
    assert shape(plan) == [(f"r{order}", plan.slices[order].start, 1) for order in range(4)]
    assert plan.num_decodes == 4


def test_decodes_leave_the_prompts_their_budget() -> None:
    s = scheduler()
    s.add(make([1, 2], order=0))
    land(s, s.schedule())
    s.add(make(list(range(16)), order=1))
    assert shape(s.schedule()) == [("r0", 2, 1), ("r1", 0, 16)]


def test_steps_in_flight_share_what_decodes_and_chunks_go_on() -> None:
    s = Scheduler(BlockPool(64, 4), make_limits(max_seqs=6, max_step_tokens=16, num_blocks=64), shares=3)
    for order in range(5):
        s.add(make([order], max_tokens=9, order=order))
    first = s.schedule()
    assert len(first.slices) == 5 and not s.schedule().slices, "no token is drawn yet"
    land(s, first)
    plans = [s.schedule() for _ in range(3)]
    assert [[part.sequence.order for part in plan.slices] for plan in plans] == [[0, 1], [2, 3], [4]]
    s.add(make(list(range(40)), order=9))
    assert shape(s.schedule()) == [("r9", 0, 16)]
    assert shape(s.schedule()) == [("r9", 16, 16)], "the next chunk needs no token of the one before"
    land(s, plans[1])
    assert shape(s.schedule()) == [("r2", 2, 1), ("r3", 2, 1), ("r9", 32, 8)]


def test_prefill_chunk_limits_one_request() -> None:
    s = scheduler(prefill_chunk=3)
    s.add(make(list(range(7))))
    starts = []
    for _ in range(3):
        plan = s.schedule()
        starts.append(shape(plan)[0][1:])
        land(s, plan)
    assert starts == [(0, 3), (3, 3), (6, 1)]


def test_a_prefix_hit_is_not_recomputed() -> None:
    s = scheduler()
    s.add(make(list(range(9)), max_tokens=1, order=0))
    land(s, s.schedule())
    s.add(make(list(range(9)), max_tokens=1, order=1))
    plan = s.schedule()
    assert shape(plan) == [("r1", 8, 1)]
    assert plan.prefix_hit_tokens == 8


def test_the_latest_arrival_is_preempted_and_loses_nothing() -> None:
    s = scheduler(num_blocks=4, size=2, max_step_tokens=8)
    first, second = make([1, 2, 3], 5, 0), make([4, 5, 6], 5, 1)
    s.add(first)
    s.add(second)
    for _ in range(40):
        land(s, s.schedule())
        if first.finish_reason and second.finish_reason:
            break
    assert s.preemptions > 0
    assert first.token_ids == [1, 2, 3] + [7] * 5
    assert second.token_ids == [4, 5, 6] + [7] * 5
    assert s.pool.num_used == 0


def test_a_preempted_sequences_own_blocks_are_no_prefix_hit() -> None:
    """Distinct prompts: whatever is found on coming back, it filled itself."""
    s = scheduler(num_blocks=10, size=2, max_step_tokens=16)
    sequences = [make([10 * i + j for j in range(6)], 6, i) for i in range(3)]
    for sequence in sequences:
        s.add(sequence)
    hits = found = 0
    for _ in range(60):
        waiting = {id(each) for each in s.waiting}
        plan = s.schedule()
        found += sum(part.start for part in plan.slices if id(part.sequence) in waiting)
        hits += plan.prefix_hit_tokens
        land(s, plan)
    assert all(each.finish_reason for each in sequences)
    assert s.preemptions > 0
    assert found > 0
    assert hits == 0


def test_blocks_of_a_step_in_flight_are_not_reused_before_it_lands() -> None:
    s = scheduler(num_blocks=4, size=2, max_step_tokens=8)
    sequence = make([1, 2, 3], 8, 0)
    s.add(sequence)
    plan = s.schedule()
    blocks = set(sequence.blocks)
    s.finish(sequence, "abort")
    other = make([9, 9, 9], 1, 1)
    s.add(other)
    s.schedule()
    assert blocks.isdisjoint(other.blocks)
    land(s, plan)
    assert s.pool.num_used == len(other.blocks)


def test_a_fork_shares_blocks_and_copies_on_write() -> None:
    s = scheduler()
    parent = make(list(range(6)), 4, 0)
    s.add(parent)
    land(s, s.schedule())
    child = make(list(range(6)), 4, 0, name="child")
    s.fork(parent, child)
    assert child.blocks == parent.blocks
    plan = s.schedule()
    assert [start for _, start, _ in shape(plan)] == [6, 5]
    assert len(plan.copies) == 1
    assert parent.blocks[0] == child.blocks[0]
    assert parent.blocks[1] != child.blocks[1]


def test_a_fork_waits_where_its_parent_has_not_computed_the_prompt() -> None:
    """A parent that was preempted after its prompt was computed: it waits, or computes the prompt again."""
    s = Scheduler(BlockPool(32, 4, prefix_cache=False), make_limits(prefill_chunk=3))
    parent = make(list(range(6)), 4, 0)
    s.add(parent)
    for _ in range(2):
        land(s, s.schedule())
    s._preempt(parent)
    s.fork(parent, waits := make(list(range(6)), 4, 0, name="waits"))
    assert (waits.running, waits.blocks) == (False, []) and waits in s.waiting
    s.finish(waits, "abort")
    land(s, s.schedule())
    assert parent.running and parent.num_landed == 3
    s.fork(parent, early := make(list(range(6)), 4, 0, name="early"))
    assert (early.running, early.blocks) == (False, []) and list(s.waiting) == [early]


def test_a_fork_waits_for_a_place_and_for_a_row() -> None:
    """Rows of sequences that have ended are held by steps in flight, so they can be short where places are
    free."""
    s = scheduler(max_seqs=3, max_step_tokens=64, num_blocks=64)
    parent, *others = sequences = [make([order] * 6, 4, order) for order in range(3)]
    for sequence in sequences:
        s.add(sequence)
    first = s.schedule()
    for other in others:
        s.finish(other, "abort")
    later = [make([order] * 6, 4, order) for order in (3, 4)]
    for sequence in later:
        s.add(sequence)
    second = s.schedule()
    for sequence in later:
        s.finish(sequence, "abort")
    assert s.running == [parent] and second.num_decodes == 1
    s.land(first.slices[0], 7)
    children = [make([0] * 6, 4, 0, name=f"child{i}") for i in range(3)]
    s.fork(parent, children[0])
    s.fork(parent, children[1])
    assert [child.running for child in children[:2]] == [True, False], "one row was left"
    for part in first.slices[1:]:
        s.land(part, 7)
    land(s, second)
    s.fork(parent, children[2])
    assert children[2].running and len(s.running) == 3
    s.fork(parent, full := make([0] * 6, 4, 0, name="full"))
    assert not full.running and list(s.waiting) == [full, children[1]]


def test_the_victim_is_the_latest_arrival_whoever_asks() -> None:
    s = scheduler(num_blocks=6, size=2)
    sequences = [make([order] * 4, 5, order) for order in range(3)]
    for sequence in sequences:
        s.add(sequence)
    land(s, s.schedule())
    plan = s.schedule()
    assert shape(plan) == [("r0", 4, 1), ("r1", 4, 1)]
    assert list(s.waiting) == [sequences[2]]
    assert plan.preemptions == 1


def test_a_step_that_preempted_admits_nobody() -> None:
    """The blocks it won belong to those who run: whoever it admitted would be the next to go."""
    pool = BlockPool(5, 2, prefix_cache=False)
    s = Scheduler(pool, make_limits(prefill_chunk=4))
    old, victim = make([1] * 4, 5, 0), make([2] * 6, 5, 1)
    s.add(old)
    s.add(victim)
    land(s, s.schedule())
    plan = s.schedule()
    assert plan.preemptions == 1
    assert pool.num_free == 2, "enough for the victim's next chunk"
    assert shape(plan) == [("r0", 4, 1)]
    assert list(s.waiting) == [victim]


def test_copies_of_shared_blocks_are_reserved() -> None:
    """A fork's first write copies a block: with none free, the latest arrival goes, and none is missing."""
    s = scheduler(num_blocks=4)
    parent, other = make(list(range(6)), 4, 0), make([9] * 8, 4, 1)
    s.add(parent)
    s.add(other)
    plan = s.schedule()
    land(s, plan)
    s.fork(parent, child := make(list(range(6)), 4, 0, name="child"))
    assert s.pool.num_free == 0
    plan = s.schedule()
    assert [part.sequence for part in plan.slices] == [parent, child]
    assert list(s.waiting) == [other]
    assert len(plan.copies) == 1


def test_updates_of_a_plan_without_slices_wait_for_one_that_runs() -> None:
    s = scheduler(num_blocks=4)
    parent, other = make(list(range(6)), 4, 0), make([9] * 8, 4, 1)
    s.add(parent)
    s.add(other)
    first, second = s.schedule().slices
    s.land(first, 7)
    s.fork(parent, child := make(list(range(6)), 4, 0, name="child"))
    s.finish(other, "abort")
    # Every block is held, two of them by the step in flight.
    empty = s.schedule()
    assert (empty.slices, empty.table_updates, empty.copies) == ([], {}, [])
    s.land(second, 7)
    updates = s.schedule().table_updates
    assert {column: updates[child.row, column] for column in (0, 1)} == dict(enumerate(child.blocks))
    assert updates[parent.row, 1] == parent.blocks[1] != child.blocks[1]


def test_preemptions_of_a_plan_without_slices_are_told_by_one_that_runs() -> None:
    s = scheduler(num_blocks=4, size=2)
    s.add(make([1] * 4, 4, 0))
    s.add(make([2] * 4, 4, 1))
    plan = s.schedule()
    empty = s.schedule()
    assert (empty.slices, empty.preemptions, s.preemptions) == ([], 0, 1)
    land(s, plan)
    assert s.schedule().preemptions == 1


def test_an_entry_of_the_block_table_is_updated_once_a_step() -> None:
    """A fork's shared block and the copy that replaces it are one entry: the copy."""
    s = scheduler()
    parent = make(list(range(6)), 4, 0)
    s.add(parent)
    land(s, s.schedule())
    children = [make(list(range(6)), 4, 0, name=f"child{i}") for i in range(2)]
    for child in children:
        s.fork(parent, child)
    plan = s.schedule()
    for child in children:
        assert [plan.table_updates[child.row, i] for i in range(2)] == child.blocks
    assert len({child.blocks[1] for child in children}) == 2


class TrafficMachine(RuleBasedStateMachine):
    """Random add, step, land, abort and fork with two or more steps in flight and a tight pool."""

    @initialize(
        blocks=st.integers(8, 20),
        chunk=st.sampled_from([None, 1, 3]),
        budget=st.integers(3, 12),
        shares=st.sampled_from([1, 1, 2, 3]),
    )
    def begin(self, blocks: int, chunk: int | None, budget: int, shares: int) -> None:
        self.size = 2
        limits = make_limits(max_seqs=3, max_step_tokens=budget, prefill_chunk=chunk or budget)
        self.s = Scheduler(BlockPool(blocks, self.size), limits, shares)
        self.flying: deque[StepPlan] = deque()
        self.all: list[Sequence] = []
        self.orders = 0
        self.table: dict[tuple[int, int], int] = {}
        """The device's block table, as the plans that ran made it."""
        self.told = 0

    @rule(prompt=st.lists(st.integers(0, 2), min_size=1, max_size=8), outputs=st.integers(1, 6))
    def add(self, prompt: list[int], outputs: int) -> None:
        sequence = make(prompt, outputs, self.orders)
        self.orders += 1
        self.all.append(sequence)
        self.s.add(sequence)

    @rule()
    def step(self) -> None:
        if len(self.flying) == max(2, self.s.shares):
            self.land_oldest()
        plan = self.schedule()
        if not plan.slices:
            return
        assert plan.num_tokens - plan.num_decodes <= self.s.limits.max_step_tokens
        assert plan.num_decodes <= self.s.limits.max_seqs
        if self.s.shares > 1:
            assert all(part.start + part.num_tokens <= len(part.sequence.token_ids) for part in plan.slices)
        assert len(plan.slices) == len({id(part.sequence) for part in plan.slices})
        targets = [target for _, target in plan.copies]
        assert len(targets) == len(set(targets))
        assert len(targets) <= len(plan.slices), "more copies than a step's buffers hold"
        for part in plan.slices:
            sequence = part.sequence
            if not sequence.running:
                continue
            first, last = part.start // self.size, (part.start + part.num_tokens - 1) // self.size
            for block in sequence.blocks[first : last + 1]:
                assert self.s.pool.readers(block) == 1, "a write reaches a block with two readers"
                assert not self.s.pool.is_published(block), "a write changes a block that can be found"
        self.flying.append(plan)

    def schedule(self) -> StepPlan:
        """The next plan; a step that runs finds every block it needs in the table."""
        plan = self.s.schedule()
        if not plan.slices:
            assert plan == StepPlan(), "a plan that is not launched would lose something"
            return plan
        self.told += plan.preemptions
        assert self.told == self.s.preemptions
        self.table |= plan.table_updates
        for part in plan.slices:
            sequence = part.sequence
            for column in range(-(-(part.start + part.num_tokens) // self.size)):
                assert self.table[sequence.row, column] == sequence.blocks[column]
        return plan

    @rule()
    def land_oldest(self) -> None:
        if self.flying:
            land(self.s, self.flying.popleft())

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        open_ = [sequence for sequence in self.all if sequence.finish_reason is None]
        if open_:
            self.s.finish(data.draw(st.sampled_from(open_)), "abort")

    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parents = [q for q in self.s.running if q.num_landed >= q.prompt_len]
        if parents:
            parent = data.draw(st.sampled_from(parents))
            prompt = parent.token_ids[: parent.prompt_len]
            child = make(prompt, parent.params.max_tokens, parent.order, name="fork")
            self.all.append(child)
            self.s.fork(parent, child)

    @invariant()
    def books_balance(self) -> None:
        if not hasattr(self, "s"):
            return
        self.s.pool.check()
        holders = [sequence for sequence in self.all if sequence.row >= 0]
        for block in range(self.s.pool.num_blocks):
            held = sum(sequence.blocks.count(block) for sequence in holders)
            assert self.s.pool.readers(block) == held
        rows = [sequence.row for sequence in holders]
        assert len(rows) == len(set(rows))
        for sequence in self.s.running:
            full = sequence.num_landed // self.size
            for block in sequence.blocks[full:]:
                assert sequence.forked or not self.s.pool.is_published(block), "published before computed"

    def teardown(self) -> None:
        """Everyone left gets served: no starvation, nothing leaked, no token lost."""
        if not hasattr(self, "s"):
            return
        for _ in range(2000):
            plan = self.schedule()
            if plan.slices:
                self.flying.append(plan)
            if len(self.flying) == 2 or not plan.slices:
                if not self.flying:
                    break
                land(self.s, self.flying.popleft())
        assert all(sequence.finish_reason for sequence in self.all), "a sequence starved"
        for sequence in self.all:
            if sequence.finish_reason == "length":
                assert len(sequence.token_ids) == sequence.prompt_len + sequence.params.max_tokens
        assert self.s.pool.num_used == 0


TrafficMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)
TestTraffic = TrafficMachine.TestCase
