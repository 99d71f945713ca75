"""Prompt lookup: a sequence that repeats itself is continued as it went on before (Saxena 2023).

No weights and no device. The last tokens are looked up among all earlier ones, the longest match first and
of equal ones the latest; what followed there is copied, and where that runs into the sequence's end the
copy goes on with what it has copied (as in Ziv & Lempel 1977), so that any period is continued.
"""

from __future__ import annotations

import numpy as np

from backbench.engine.scheduling.blocks import BlockPool
from backbench.engine.scheduling.scheduler import StepPlan
from backbench.engine.scheduling.sequence import Sequence
from backbench.engine.speculation.proposer import Proposer

SHORTEST, LONGEST = 2, 4
"""Tokens of a match. One token alone says too little of the next."""
FACTOR = 0x9E3779B97F4A7C15
"""Of the polynomial that hashes an n-gram to 64 bits. Two of one hash would make a poor guess at worst."""
MASK = 2**64 - 1
POWERS = tuple(pow(FACTOR, power, 2**64) for power in range(LONGEST))


class _Index:
    """Where each n-gram of a sequence ended last, the one at its very end left out."""

    __slots__ = ("ends", "indexed")

    def __init__(self, token_ids: list[int]) -> None:
        self.ends: dict[int, dict[int, int]] = {}
        """Length of an n-gram -> its hash -> where the last one ends."""
        self.indexed = len(token_ids) - 1
        """The n-grams that end at or before this length are in `ends`."""
        tokens = np.array(token_ids[:-1], dtype=np.uint64)
        hashes = np.zeros(len(tokens) + 1, dtype=np.uint64)
        for length in range(1, LONGEST + 1):
            hashes = hashes[:-1] * np.uint64(FACTOR) + tokens[length - 1 :]
            if length >= SHORTEST:
                self.ends[length] = dict(zip(hashes.tolist(), range(length, len(token_ids)), strict=False))

    def extend(self, token_ids: list[int]) -> None:
        """Take in all n-grams but those that end with the sequence."""
        for end in range(self.indexed + 1, len(token_ids)):
            hashes = _hashes(token_ids, end)
            for length in range(SHORTEST, len(hashes) + 1):
                self.ends[length][hashes[length - 1]] = end
        self.indexed = len(token_ids) - 1


def _hashes(token_ids: list[int], end: int) -> list[int]:
    """Of the n-grams that end there, one token long to LONGEST: each an older token more than the last."""
    value, found = 0, []
    for length in range(1, min(LONGEST, end) + 1):
        value = (value + token_ids[end - length] * POWERS[length - 1]) & MASK
        found.append(value)
    return found


class NgramProposer(Proposer):
    """Each sequence keeps an index of its own n-grams, so a look-up does not grow with its length."""

    def propose(self, plan: StepPlan, rooms: list[int], pool: BlockPool) -> list[list[int]]:
        self.steady = all(part.sequence.proposer_state for part in plan.slices[: len(rooms)])
        return [lookup(part.sequence, room) for part, room in zip(plan.slices, rooms, strict=False)]


def lookup(sequence: Sequence, tokens: int) -> list[int]:
    """The `tokens` that followed the last match of the sequence's end; none without a match."""
    known = sequence.token_ids
    index = sequence.proposer_state
    if index is None:
        index = sequence.proposer_state = _Index(known)
    else:
        index.extend(known)
    count = len(known)
    hashes = _hashes(known, count)
    for length in range(len(hashes), SHORTEST - 1, -1):
        end = index.ends[length].get(hashes[length - 1])
        if end is not None:
            copied = known[end : end + tokens]
            while len(copied) < tokens:
                copied.append(copied[len(copied) - (count - end)])
            return copied
    return []
