"""A smaller model that drafts: its own weights and KV caches, over the target's blocks and block table.

A block holds the same tokens for both models, so a prefix hit, a fork or a copy serves both. The draft model
runs behind: before it drafts it computes what the target has computed without it. Drafts are drawn with the
noise that the target's own draw at that place will have (`backends.noise`): where both models think alike,
both then pick the same token, at any temperature.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from backbench.backends.interface import Operations, SamplingBatch
from backbench.engine.execution.results import StepInFlight
from backbench.engine.execution.runner import Runner
from backbench.engine.limits import EngineLimits
from backbench.engine.models.decoder import Decoder
from backbench.engine.scheduling.blocks import BlockPool
from backbench.engine.scheduling.scheduler import Slice, StepPlan
from backbench.engine.scheduling.sequence import Sequence
from backbench.engine.speculation.proposer import Proposer
from backbench.engine.speculation.rejection import probabilities


class _Computed:
    """How far the draft model has come with one sequence, for as long as it holds the same blocks."""

    __slots__ = ("blocks", "guessed", "marked", "tokens")

    def __init__(self, blocks: list[int], tokens: int, marked: int) -> None:
        self.blocks = blocks
        self.tokens = tokens
        """Leading tokens whose K and V are in the draft model's caches."""
        self.guessed: list[int] = []
        """Drafted tokens after those whose K and V are there, too; of use as far as they were accepted."""
        self.marked = marked
        """Leading blocks that are known to hold K and V of both models."""


class DraftProposer(Proposer):
    """Drafts one token after the other, each of all sequences at once; the device waits for none of them."""

    on_device = True
    runner_class: ClassVar[type[Runner]] = Runner
    usual_tokens = 2
    """Of a sequence in the first pass, at most, unless the draft model was behind: it never computes the last
    token that it drafts."""

    def __init__(
        self,
        decoder: Decoder,
        operations: Operations,
        limits: EngineLimits,
        *,
        graphs: bool,
        keep_probabilities: bool = False,
    ) -> None:
        """limits: the target's; the draft model has the same rows, blocks and steps, without drafts.

        keep_probabilities: of the drafts of the last plan, which must not run in graphs then.
        """
        self.decoder = decoder
        self.limits = replace(limits, draft_tokens=0)
        self.runner = self.runner_class(decoder, operations, self.limits, graphs=graphs)
        self._drawn_from: list[Tensor] = []
        """Of each pass of the last plan, f32[sequences, V], where they are kept."""
        self._passes: list[list[int]] = []
        """The decodes in each pass, by their place in the plan."""
        if keep_probabilities:
            self.runner.sample = self._sample_and_keep
        self._filled: dict[int, Hashable] = {}
        """Block -> its `_content` when the draft model, too, had filled it."""
        self._updates: dict[tuple[int, int], int] = {}
        """Of the block table, since the draft model ran last."""

    def propose(self, plan: StepPlan, rooms: list[int], pool: BlockPool) -> list[list[int]]:
        self._updates |= plan.table_updates
        self._drawn_from.clear()
        self._passes = []
        drafts: list[list[int]] = [[] for _ in rooms]
        first, order = self._first_pass(plan, rooms, pool)
        if not first.slices:
            self._copy(plan)
            return drafts
        first.copies, first.table_updates, self._updates = plan.copies, self._updates, {}
        passes = [(self.runner.launch(first), order)]
        parts = {index: plan.slices[index] for index in order}
        for place in range(1, max((rooms[index] for index in order), default=0)):
            order = [index for index in order if rooms[index] > place]
            slices = [
                Slice(part.sequence, self._within_reach(part) - 1 + place, 1, 1, part.draw + place)
                for part in (parts[index] for index in order)
            ]
            passes.append((self.runner.launch(StepPlan(slices, len(slices), len(slices))), order))
        for step, drafted in passes:
            _read(step, drafted, drafts)
        self._passes = [order for _, order in passes if order]
        for index, part in parts.items():
            self._state(part.sequence, pool).guessed = self._lasting(drafts[index])
        return drafts

    def probabilities(self, plan: StepPlan) -> Tensor | None:
        device = self.decoder.device.torch_device
        starts = torch.tensor([part.samples for part in plan.slices]).cumsum(0).tolist()
        found = torch.zeros(starts[-1], self.decoder.config.vocab_size, device=device)
        for place, (order, drawn_from) in enumerate(zip(self._passes, self._drawn_from, strict=True)):
            rows = [starts[index] - plan.slices[index].samples + place for index in order]
            found[rows] = drawn_from
        return found

    def _sample_and_keep(self, logits: Tensor, sampling: SamplingBatch) -> Tensor:
        self._drawn_from.append(probabilities(logits, sampling))
        return self.decoder.operations.sample(logits, sampling)

    def skip(self, plan: StepPlan) -> None:
        self._updates |= plan.table_updates
        self._copy(plan)

    def warm_up(self, *, sampled: bool, filtered: bool) -> None:
        self.runner.capture(sampled=sampled, filtered=filtered)

    def memory(self) -> tuple[int, int]:
        return self.decoder.weights.num_bytes, self.decoder.cache_bytes_per_block()

    def _first_pass(self, plan: StepPlan, rooms: list[int], pool: BlockPool) -> tuple[StepPlan, list[int]]:
        """What the draft model has to compute before it can go on token by token, as a plan, and the decodes,
        by their place in `plan`, of which it samples the first drafted token.

        It computes the prompts of `plan` beside the target. A sequence that it is far behind with, having
        been switched off, may take several steps.
        """
        budget = self.limits.max_step_tokens
        decodes: list[tuple[int, Slice]] = []
        longer: list[tuple[int | None, Slice]] = []
        for index, part in enumerate(plan.slices):
            is_decode = index < len(rooms)
            end = self._within_reach(part)
            if (is_decode and rooms[index] == 0) or not part.sequence.running or end == 0:
                continue
            state = self._state(part.sequence, pool)
            start = state.tokens
            if is_decode:
                start = min(start, end - 1)
            count = 1
            if is_decode and end - start == 1:
                decodes.append((index, Slice(part.sequence, start, 1, 1, part.draw)))
            elif (count := min(end - start, budget)) > 0:
                budget -= count
                samples = is_decode and start + count == end
                behind = Slice(part.sequence, start, count, samples, part.draw)
                longer.append((index if samples else None, behind))
            state.tokens = max(state.tokens, start + count)
        self.steady = all(
            index is not None and part.num_tokens <= self.usual_tokens for index, part in longer
        )
        first = StepPlan([part for _, part in decodes] + [part for _, part in longer], len(decodes))
        first.num_tokens = sum(part.num_tokens for part in first.slices)
        return first, [index for index, _ in [*decodes, *longer] if index is not None]

    def _state(self, sequence: Sequence, pool: BlockPool) -> _Computed:
        """How far the draft model is, drafts that were accepted since included."""
        state = sequence.proposer_state
        size = pool.block_size
        if state is None or state.blocks is not sequence.blocks:
            blocks = 0
            while blocks < len(sequence.blocks) and self._is_filled(sequence, blocks, pool):
                blocks += 1
            state = sequence.proposer_state = _Computed(sequence.blocks, blocks * size, blocks)
        known = sequence.token_ids
        for token in state.guessed:
            if state.tokens >= len(known) or known[state.tokens] != token:
                break
            state.tokens += 1
        state.guessed = []
        while (state.marked + 1) * size <= state.tokens:
            block = sequence.blocks[state.marked]
            self._filled[block] = self._content(sequence, state.marked, pool)
            state.marked += 1
        return state

    def _is_filled(self, sequence: Sequence, index: int, pool: BlockPool) -> bool:
        content = self._content(sequence, index, pool)
        return content is not None and self._filled.get(sequence.blocks[index]) == content

    def _within_reach(self, part: Slice) -> int:
        """Tokens of a sequence, from its first, that can be computed before the step of `part`."""
        return part.start + part.num_tokens

    def _lasting(self, drafted: list[int]) -> list[int]:
        """Of drafted tokens those whose K and V are there, and right if they are accepted."""
        return drafted[:-1]

    def _content(self, sequence: Sequence, index: int, pool: BlockPool) -> Hashable:
        """What, if it stays the same, says that a block of a sequence holds the same K and V; None = they
        cannot be there."""
        return pool.allocations[sequence.blocks[index]]

    @torch.inference_mode()
    def _copy(self, plan: StepPlan) -> None:
        if plan.copies:
            source, target = torch.tensor(plan.copies, device=self.decoder.device.torch_device).T
            self.decoder.copy_blocks(self.runner.caches, source, target)


def _read(step: StepInFlight, order: list[int], drafts: list[list[int]]) -> None:
    """Wait for a pass and give each sequence the token it drafted."""
    tokens, _, _ = step.read()
    for index, token in zip(order, tokens, strict=True):
        drafts[index].append(token)
