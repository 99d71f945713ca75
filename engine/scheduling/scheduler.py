"""Which sequences run in the next step, and how many tokens each.

One rule, no phases: a step gives every scheduled sequence some tokens, and its computed count catches up
with its known count. Chunked prefill, prefix hits, preemption and forks all fall out of that.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from backbench.engine.execution.step_shape import StepShape
from backbench.engine.limits import EngineLimits
from backbench.engine.scheduling.blocks import BlockPool
from backbench.engine.scheduling.sequence import Sequence


@dataclass(slots=True)
class Slice:
    """The part of one sequence that a step computes: tokens start to start + num_tokens."""

    sequence: Sequence
    start: int
    num_tokens: int
    samples: int
    """Tokens drawn from the logits of its last tokens: one when it reaches the last known token, and one more
    for each drafted token after that."""
    draw: int
    """Index of the first output token it samples."""
    draft: tuple[int, ...] = ()
    """Drafted tokens at its end, to be verified: tentative, and no part of the sequence yet."""


@dataclass
class StepPlan:
    """One step's work. `slices` holds the decodes (one token, sampling) first."""

    slices: list[Slice] = field(default_factory=list)
    num_decodes: int = 0
    num_tokens: int = 0
    num_drafted: int = 0
    """Drafted tokens among them."""
    copies: list[tuple[int, int]] = field(default_factory=list)
    """Copy-on-write: (source, destination) blocks, to be copied before the step writes, in this order or
    all at once: a source that nobody reads any more may be a later copy's destination."""
    table_updates: dict[tuple[int, int], int] = field(default_factory=dict)
    """Entries of the block table that changed since the last plan: (row, logical block) -> physical block.
    One value an entry: a device leaves open which of two would win."""
    prefix_hit_tokens: int = 0
    """Tokens found in the cache by sequences that start for the first time."""
    preemptions: int = 0
    """Sequences preempted since the last plan."""

    @property
    def shape(self) -> StepShape:
        """Its own shape, without padding."""
        if self.num_drafted:
            longest = max(part.num_tokens for part in self.slices)
            return StepShape(0, len(self.slices), self.num_tokens, longest)
        decodes = self.num_decodes
        return StepShape(decodes, len(self.slices) - decodes, self.num_tokens - decodes)


class Scheduler:
    """First come, first served under a budget of prompt tokens a step, with recompute preemption."""

    def __init__(self, pool: BlockPool, limits: EngineLimits, shares: int = 1) -> None:
        """shares: above 1, so many steps in flight each take a share of what decodes, and a sequence whose
        next token is still being drawn waits for it: the host knows every token that a step computes."""
        self.pool = pool
        self.limits = limits
        self.shares = shares
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """In order of arrival."""
        self._free_rows = list(reversed(range(limits.num_rows)))
        self._releasing = 0
        """Sequences that gave up their blocks but are still in flight."""
        self._table_updates: dict[tuple[int, int], int] = {}
        """Collected for the next plan that has slices; the latest value of an entry counts."""
        self.preemptions = 0
        """Preemptions so far."""
        self._untold_preemptions = 0
        """Those of them that no plan has told of."""

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence behind those that arrived before it."""
        place = len(self.waiting)
        while place and self.waiting[place - 1].order > sequence.order:
            place -= 1
        self.waiting.insert(place, sequence)

    def schedule(self) -> StepPlan:
        """Plan the next step and advance every count as if it had run.

        A plan without slices has nothing else either: table updates and preemptions wait for one that runs.
        """
        plan = StepPlan()
        decodes: list[Slice] = []
        prefills: list[Slice] = []
        preemptions = self.preemptions
        budget = self._schedule_running(plan, decodes, prefills)
        if self.preemptions == preemptions:
            self._admit(plan, prefills, decodes, budget)
        plan.slices = decodes + prefills
        if not plan.slices:
            return plan
        plan.table_updates, self._table_updates = self._table_updates, {}
        plan.preemptions, self._untold_preemptions = self._untold_preemptions, 0
        plan.num_decodes = len(decodes)
        plan.num_tokens = len(decodes) + sum(part.num_tokens for part in prefills)
        return plan

    def reserve(self, plan: StepPlan, part: Slice, count: int) -> int:
        """Allocate blocks for up to `count` drafted tokens of a decode of `plan`; returns for how many.

        As many as could become output, in blocks that are free. Comes after `schedule`, while no step is in
        flight: what others need for sure is allocated by then, and nobody is preempted for a guess.
        """
        sequence, size, end = part.sequence, self.pool.block_size, part.start + 1
        if not sequence.running:
            return 0  # preempted by one that came before it
        blocks = sequence.blocks
        room = min((len(blocks) + self.pool.num_free) * size, sequence.end_len - 1) - end
        count = max(0, min(count, room))
        while len(blocks) * size < end + count:
            block = self.pool.allocate()
            plan.table_updates[sequence.row, len(blocks)] = block
            blocks.append(block)
        return count

    def extend(self, plan: StepPlan, part: Slice, drafted: list[int]) -> None:
        """Let a decode of `plan` verify drafted tokens, too, for which `reserve` found blocks.

        The sequence counts what is sure alone; `accept` adds the rest.
        """
        part.draft = tuple(drafted)
        part.num_tokens += len(drafted)
        part.samples += len(drafted)
        plan.num_tokens += len(drafted)
        plan.num_drafted += len(drafted)
        self._keep_blocks(part.sequence, part.start + part.num_tokens)

    def accept(self, part: Slice, tokens: list[int]) -> None:
        """Before `land`: of the drafted tokens of `part`, `tokens` became output; the others are rolled back.

        Their keys and values are written over by the next step, and blocks that hold nothing else are freed.
        """
        sequence = part.sequence
        part.num_tokens -= len(part.draft) - len(tokens)
        sequence.token_ids += tokens
        sequence.num_computed += len(tokens)
        sequence.num_tokens += len(tokens)
        self._keep_blocks(sequence, sequence.num_computed)

    def _keep_blocks(self, sequence: Sequence, tokens: int) -> None:
        """Free the blocks of a sequence that hold none of its first `tokens`."""
        kept = -(-tokens // self.pool.block_size)
        if sequence.running and len(sequence.blocks) > kept:
            self.pool.release(sequence.blocks[kept:])
            del sequence.blocks[kept:]

    def land(self, part: Slice, token: int | None) -> bool:
        """Account for a slice whose step has finished; `token` is what it sampled (None = nothing).

        Returns whether the token counts: False for a sequence that had ended meanwhile. Publishes blocks
        that are now full and computed, and frees those of sequences that ended or were preempted.
        """
        sequence = part.sequence
        sequence.in_flight -= 1
        ended = sequence.finish_reason is not None
        counts = part.samples > 0 and not ended
        if counts:
            assert token is not None
            sequence.token_ids.append(token)
        landed = part.start + part.num_tokens
        preempted = sequence.num_computed < landed
        if ended or preempted:
            if sequence.in_flight == 0:
                self._releasing -= 1
                self._release(sequence)
        else:
            sequence.num_landed = landed
            if landed >= (sequence.num_published + 1) * self.pool.block_size:
                self._publish(sequence)
        return counts

    def finish(self, sequence: Sequence, reason: str) -> None:
        """End a sequence, wherever it stands; its blocks are freed once no step in flight reads them."""
        sequence.finish_reason = reason
        if sequence.running:
            self._stop_running(sequence)
        else:
            self.waiting.remove(sequence)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Start `child` on the blocks of `parent`, which has computed all tokens of its prompt, or all but
        the last.

        The child computes the prompt's last token for its logits; that write copies the shared block.
        Without a free place it queues first in line instead, and shares through the prefix cache only.
        """
        full = len(self.running) >= self.limits.max_seqs or not self._free_rows
        if full or not parent.running or parent.num_landed < child.prompt_len - 1:
            self._return(child)
            return
        child.blocks = parent.blocks[: -(-child.prompt_len // self.pool.block_size)]
        self.pool.acquire(child.blocks)
        child.forked = parent.forked = True
        child.num_computed = child.num_landed = child.prompt_len - 1
        child.num_published = child.num_computed // self.pool.block_size
        self._start(child)
        self._table_updates |= {(child.row, i): block for i, block in enumerate(child.blocks)}

    def _schedule_running(self, plan: StepPlan, decodes: list[Slice], prefills: list[Slice]) -> int:
        """Give running sequences their tokens, decodes first and outside the budget; returns what is left."""
        budget = self.limits.max_step_tokens
        catching_up: list[Sequence] = []
        most_decodes = -(-len(self.running) // self.shares)
        for sequence in list(self.running):
            num_tokens = sequence.num_tokens
            if not sequence.running or num_tokens >= sequence.end_len:
                continue
            if num_tokens - sequence.num_computed > 1:
                catching_up.append(sequence)
            elif self.shares > 1 and sequence.num_computed == len(sequence.token_ids):
                continue
            elif len(decodes) < most_decodes and self._make_room(sequence, 1):
                decodes.append(self._take(plan, sequence, 1))
        for sequence in catching_up:
            count = min(sequence.num_tokens - sequence.num_computed, budget, self.limits.prefill_chunk)
            if count and sequence.running and self._make_room(sequence, count):
                prefills.append(self._take(plan, sequence, count))
                budget -= count
        return budget

    def _admit(self, plan: StepPlan, prefills: list[Slice], decodes: list[Slice], budget: int) -> None:
        """Start waiting sequences while budget, places and blocks last."""
        size = self.pool.block_size
        while self.waiting and budget and len(self.running) < self.limits.max_seqs and self._free_rows:
            sequence = self.waiting[0]
            if sequence.in_flight:
                break
            hits = self.pool.match(sequence.token_ids, sequence.digests)
            computed = len(hits) * size
            count = min(sequence.num_tokens - computed, budget, self.limits.prefill_chunk)
            self.pool.acquire(hits)
            if -(-(computed + count) // size) - len(hits) > self.pool.num_free:
                self.pool.release(hits)
                break
            self.waiting.popleft()
            sequence.blocks = hits
            sequence.num_computed = sequence.num_landed = computed
            sequence.num_published = len(hits)
            if not sequence.preempted:  # else it finds the blocks that it filled itself
                plan.prefix_hit_tokens += computed
            self._start(sequence)
            self._table_updates |= {(sequence.row, i): block for i, block in enumerate(hits)}
            part = self._take(plan, sequence, count)
            (decodes if part.num_tokens == 1 and part.samples else prefills).append(part)
            budget -= count

    def _make_room(self, sequence: Sequence, count: int) -> bool:
        """See to it that `count` more tokens of a running sequence have blocks, preempting later arrivals.

        False when the sequence itself had to go, or must wait for blocks of sequences still in flight.
        """
        while self._blocks_needed(sequence, count) > self.pool.num_free:
            if self._releasing:
                return False
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, victim: Sequence) -> None:
        victim.num_computed = 0
        victim.preempted = True
        self._stop_running(victim)
        self._return(victim)
        self.preemptions += 1
        self._untold_preemptions += 1

    def _return(self, sequence: Sequence) -> None:
        """Queue a sequence before those that arrived with it or later."""
        place = 0
        while place < len(self.waiting) and self.waiting[place].order < sequence.order:
            place += 1
        self.waiting.insert(place, sequence)

    def _blocks_needed(self, sequence: Sequence, count: int) -> int:
        """Fresh blocks that computing `count` more tokens takes, copies of shared ones included."""
        size = self.pool.block_size
        needed = -(-(sequence.num_computed + count) // size) - len(sequence.blocks)
        if sequence.forked:
            for block in sequence.blocks[sequence.num_computed // size :]:
                needed += self.pool.is_shared(block)
        return needed

    def _take(self, plan: StepPlan, sequence: Sequence, count: int) -> Slice:
        """Allocate blocks for `count` more tokens of a sequence and count them as computed."""
        size = self.pool.block_size
        start = sequence.num_computed
        end = start + count
        blocks = sequence.blocks
        if sequence.forked:
            self._copy_shared(plan, sequence, start // size)
        while len(blocks) * size < end:
            block = self.pool.allocate()
            self._table_updates[sequence.row, len(blocks)] = block
            blocks.append(block)
        known = sequence.num_tokens
        samples = end == known
        sequence.num_computed = end
        sequence.in_flight += 1
        sequence.num_tokens = known + samples
        return Slice(sequence, start, count, samples, known - sequence.prompt_len)

    def _copy_shared(self, plan: StepPlan, sequence: Sequence, first: int) -> None:
        """Give a sequence its own copies of the blocks from `first` on that others read or may find."""
        for i in range(first, len(sequence.blocks)):
            source = sequence.blocks[i]
            if self.pool.is_shared(source):
                copy = self.pool.allocate()
                plan.copies.append((source, copy))
                self._table_updates[sequence.row, i] = copy
                self.pool.release((source,))
                sequence.blocks[i] = copy

    def _start(self, sequence: Sequence) -> None:
        sequence.row = self._free_rows.pop()
        sequence.running = True
        position = len(self.running)
        while position and self.running[position - 1].order > sequence.order:
            position -= 1
        self.running.insert(position, sequence)

    def _publish(self, sequence: Sequence) -> None:
        size = self.pool.block_size
        full = min(sequence.num_landed, len(sequence.token_ids) - self.pool.lookahead) // size
        while sequence.num_published < full:
            i = sequence.num_published
            digest = self.pool.digest(sequence.token_ids, sequence.digests, i)
            self.pool.publish(sequence.blocks[i], digest)
            sequence.num_published += 1

    def _stop_running(self, sequence: Sequence) -> None:
        """Free a sequence's place now, its blocks and row when its last step in flight has landed."""
        self.running.remove(sequence)
        sequence.running = False
        if sequence.in_flight:
            self._releasing += 1
        else:
            self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.forked = False
        self._free_rows.append(sequence.row)
        sequence.row = -1
