"""Synthetic acceptance: every pass runs, only whether a draft is accepted is drawn. Not for accuracy.

Random weights accept nothing real, and real ones accept what the text allows; asked for a rate, a run shows
what that rate is worth on a device. Drafts are those of prompt lookup, at its cost, filled up to their full
length; accepted ones become output as they were drafted, so that the KV cache holds what the output says.
"""

from __future__ import annotations

import zlib

from backbench.backends.noise import MASK, mix
from backbench.engine.scheduling.blocks import BlockPool
from backbench.engine.scheduling.scheduler import Slice, StepPlan
from backbench.engine.speculation.ngram import lookup
from backbench.engine.speculation.proposer import Proposer

STREAM = 0x5BEC
"""Keeps these draws apart from those that sample tokens."""
STRIDE = 7919
"""A prime: drafts without a match are any tokens, and not all alike."""


class SyntheticProposer(Proposer):
    """Always drafts as many tokens as it may."""

    accurate = False

    def __init__(self, rates: tuple[float, ...], vocab_size: int) -> None:
        """rates: each drafted token's chance to be accepted where those before it were."""
        self.rates = rates
        self.vocab_size = vocab_size

    def propose(self, plan: StepPlan, rooms: list[int], pool: BlockPool) -> list[list[int]]:
        self.steady = all(part.sequence.proposer_state for part in plan.slices[: len(rooms)])
        found = []
        for part, room in zip(plan.slices, rooms, strict=False):
            drafted = lookup(part.sequence, room)
            places = range(part.start, part.start + room)
            found.append(drafted or [STRIDE * place % self.vocab_size for place in places])
        return found

    def accepted(self, part: Slice, drawn: list[int]) -> int:
        """Whatever the model drew: fixed by request, seed and place in the output, in any batch."""
        sequence = part.sequence
        stream = mix((zlib.crc32(sequence.request_id.encode()) ^ STREAM ^ sequence.seed) & MASK)
        count = 0
        for rate in self.rates[: len(part.draft)]:
            tossed = mix((stream + part.draw + count) & MASK)
            if tossed >= rate * 2.0**32:
                break
            count += 1
        return count
