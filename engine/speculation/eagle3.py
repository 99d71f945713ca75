"""A one-layer head over the target's hidden states that drafts, in the layout of EAGLE-3.

Every step of the target leaves its tokens' fused hidden states beside their keys and values, in a row for
each slot of the KV pool. The head is then a model that drafts and runs behind like any other (`draft`): from
the rows of computed tokens, and the tokens after them, it fills a KV cache of its own over the same block
table. A block that the target has filled holds all that the head needs, so a prefix hit serves both, and
nothing is lost while drafts are switched off. As it goes on token by token, it leaves what came out of it in
the next slot's row, where it finds what it goes on from; the target's next step writes the true states there.

What the head keeps at a slot depends on the token after it, too. So a block is found in the prefix cache only
where that token is the same (`lookahead`).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from backbench.backends.interface import Batch, Operations
from backbench.engine.execution.runner import Runner, StepOutput
from backbench.engine.execution.step_buffers import StepBuffers, StepInputs
from backbench.engine.limits import EngineLimits
from backbench.engine.models.eagle3 import Eagle3Head
from backbench.engine.scheduling.blocks import BlockPool
from backbench.engine.scheduling.scheduler import Slice
from backbench.engine.scheduling.sequence import Sequence as TokenSequence
from backbench.engine.speculation.draft import DraftProposer


class HiddenStateTap:
    """Fuses hidden states of the target's steps and keeps them by slot."""

    def __init__(self, head: Eagle3Head) -> None:
        self.layers = head.config.target_layers
        self.rows: Tensor | None = None
        """[slots + 1, H], the last of the head's caches; None before there is a pool."""
        self._head = head

    def keep(self, states: Sequence[Tensor], slots: Tensor) -> None:
        """As `Tap`; padding, at slot -1, goes to the last row."""
        fused = self._head.fuse(states)
        if self.rows is not None:
            self.rows.index_put_((slots,), fused)


class HeadRunner(Runner):
    """Runs steps of the head: each slot's row, and the token after it, make the state for the next slot."""

    ids_ahead = 1
    decoder: Eagle3Head

    def _compute(self, buffers: StepBuffers, inputs: StepInputs, batch: Batch) -> StepOutput | None:
        ids, positions = buffers.unpack(inputs)
        wanted = buffers.wanted(inputs, batch) if inputs.shape.prompts > 0 else None
        rows = self.caches[-1]
        hidden = self.decoder.advance(rows[batch.slots], ids, positions, batch, self.caches, wanted)
        if inputs.num_samples == 0:
            return None
        rows.index_put_((_next_slots(buffers, inputs, positions),), hidden)
        tokens = self.sample(self.decoder.logits(hidden), buffers.sampling(inputs))
        return StepOutput(buffers.keep(inputs, tokens))


def _next_slots(buffers: StepBuffers, inputs: StepInputs, positions: Tensor) -> Tensor:
    """The slot after that of each token which is drawn from, i64[S]; -1 of padding."""
    count, size, tables = inputs.num_samples, buffers.block_size, buffers.tables
    sequences = buffers.on_device.logits_rows[:count]
    following = positions[buffers.on_device.logits_indices[:count]] + 1
    slots = tables.blocks[sequences, following // size].long() * size + following % size
    return torch.where(sequences == tables.padding_row, -1, slots)


class Eagle3Proposer(DraftProposer):
    """Drafts with a head; its own K and V at a slot take what the target computed there.

    Those of drafted tokens, computed from the head's own states, are computed again once they are accepted.
    """

    lookahead = 1
    runner_class: ClassVar[type[Runner]] = HeadRunner

    def __init__(
        self,
        head: Eagle3Head,
        operations: Operations,
        limits: EngineLimits,
        tap: HiddenStateTap,
        *,
        graphs: bool,
        keep_probabilities: bool = False,
    ) -> None:
        """tap: that of the target's decoder, which keeps hidden states where the head looks for them."""
        super().__init__(head, operations, limits, graphs=graphs, keep_probabilities=keep_probabilities)
        self.head = head
        self.usual_tokens = 1 + limits.draft_tokens
        tap.rows = self.runner.caches[-1]

    def memory(self) -> tuple[int, int]:
        return self.head.own_bytes, self.head.cache_bytes_per_block()

    def _within_reach(self, part: Slice) -> int:
        """The slots that the target has computed."""
        return part.start

    def _lasting(self, drafted: list[int]) -> list[int]:
        return []

    def _content(self, sequence: TokenSequence, index: int, pool: BlockPool) -> Hashable:
        following = (index + 1) * pool.block_size
        if following >= len(sequence.token_ids):
            return None
        return pool.allocations[sequence.blocks[index]], sequence.token_ids[following]
