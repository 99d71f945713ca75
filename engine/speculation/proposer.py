"""What a proposer is: it guesses the next tokens of sequences, for the model to verify in one step."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from backbench.engine.scheduling.blocks import BlockPool
from backbench.engine.scheduling.scheduler import Slice, StepPlan


class Proposer(ABC):
    """Drafts tokens from what the host knows. Any guess is allowed: it costs time, and changes no token."""

    accurate = True
    """False where acceptance is drawn, and the output means nothing."""
    steady = True
    """False where the last drafts took longer than the next will: what came before them had to be read."""
    on_device = False
    """True where drafting computes on the device, and waits for it."""
    lookahead = 0
    """Tokens after a KV block that what it keeps of the block depends on, too."""

    @abstractmethod
    def propose(self, plan: StepPlan, rooms: list[int], pool: BlockPool) -> list[list[int]]:
        """For each decode of `plan`, in order, at most as many tokens as its room; none without a guess.

        `plan` is about to be launched and no step is in flight, so the host knows every token. The decodes'
        blocks, of `pool`, have room for what they may draft.
        """

    def accepted(self, part: Slice, drawn: list[int]) -> int:
        """How many of the drafted tokens of `part` stand: those before the first that the model did not draw.

        drawn: the model's own tokens in their places, and the one after.
        """
        count = 0
        while count < len(part.draft) and part.draft[count] == drawn[count]:
            count += 1
        return count

    def skip(self, plan: StepPlan) -> None:  # noqa: B027
        """Take note that `plan` is about to be launched without drafts."""

    def warm_up(self, *, sampled: bool, filtered: bool) -> None:  # noqa: B027
        """Compile and capture what drafting for such requests launches."""

    def probabilities(self, plan: StepPlan) -> Tensor | None:
        """What each drafted token of `plan` was drawn from, f32[N, V]: a row for each token that the target
        draws, of zeros where nothing was drafted. None = the proposer draws nothing, it is sure.
        """
        return None

    def memory(self) -> tuple[int, int]:
        """Device bytes of its weights, and of what it keeps for each block of the pool."""
        return 0, 0
