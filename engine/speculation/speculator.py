"""Drafts before a step and what became of them after it.

Exact by construction: each drafted token is compared with the target's own draw at its position. That draw
depends on the request's seed and the output's place alone (`backends.noise`), so the tokens up to the first
that differs, and the target's own in its place, are those that plain decoding gives, at any temperature.
(Leviathan et al. 2023 accept by a coin toss instead, which keeps the distribution and not the tokens; that
is `rejection`.)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from backbench.backends.interface import Operations, SamplingBatch
from backbench.engine.execution.runner import Runner
from backbench.engine.execution.step_shape import StepShape
from backbench.engine.request import SamplingParams
from backbench.engine.scheduling.scheduler import Scheduler, Slice, StepPlan
from backbench.engine.speculation.adaptive import AdaptiveLength
from backbench.engine.speculation.proposer import Proposer
from backbench.engine.speculation.rejection import probabilities, verify
from backbench.errors import EngineError


@dataclass
class Drafts:
    """What a step drafted and what was accepted."""

    asked: int = 0
    """Tokens asked for a sequence; 0 = none."""
    num_running: int = 0
    """Sequences that ran when that was decided."""
    num_decodes: int = 0
    draft_ns: int = 0
    """Time drafting took."""
    steady: bool = True
    """False where it took longer than it will (`Proposer.steady`)."""
    results: list[tuple[int, int]] = field(default_factory=list)
    """(tokens drafted, accepted) of every sequence that had a draft."""


NO_DRAFTS = Drafts()
"""Of an engine that does not speculate."""


class Speculator:
    """Asks the proposer, puts its drafts into plans, and judges them."""

    def __init__(
        self,
        proposer: Proposer,
        tokens: int,
        *,
        adaptive: bool,
        rejection: bool = False,
        draft_model: dict[str, Any] | None = None,
    ) -> None:
        """draft_model: which model drafts, for the record."""
        self.proposer = proposer
        self.tokens = tokens
        self.length = AdaptiveLength(tokens)
        self.adaptive = adaptive
        self.rejection = rejection
        self.draft_model = draft_model
        self.padding = False
        """Every draft is filled up to its full length: a warm-up has to see every launch."""

    def warm_up(self, *, sampled: bool, filtered: bool) -> None:
        """Compile and capture what the proposer launches, and fill up drafts until `padding` is cleared."""
        self.proposer.warm_up(sampled=sampled, filtered=filtered)
        self.padding = True

    def choose(self, num_running: int) -> int:
        """Tokens to draft for each of so many running sequences in the next step."""
        if num_running == 0:
            return 0
        return self.length.choose(num_running) if self.adaptive and not self.padding else self.tokens

    @property
    def no_ahead(self) -> str | None:
        """Why no step can be launched ahead of its drafts; None = it can."""
        return "the model that drafts needs the device" if self.proposer.on_device else None

    def next_shape(self, plan: StepPlan, drafts: Drafts) -> StepShape | None:
        """The least that the step after `plan` holds if it drafts as much again, however many of these drafts
        are accepted, and no sequence ends before its length. None where it will be of another kind."""
        if plan.num_drafted == 0 or plan.num_decodes < len(plan.slices):
            return None
        if self.adaptive and not self.padding and not self.length.goes_on(drafts.num_running, drafts.asked):
            return None
        lengths = []
        for part in plan.slices:
            left = part.sequence.end_len - part.sequence.num_tokens - len(part.draft)
            if left > 0 and part.sequence.running:
                lengths.append(min(1 + len(part.draft), left))
        if max(lengths, default=1) == 1:
            return None
        return StepShape(0, len(lengths), sum(lengths), max(lengths))

    def draft(self, plan: StepPlan, tokens: int, scheduler: Scheduler) -> Drafts:
        """Let the decodes of `plan` verify up to `tokens` drafted tokens each, as far as blocks are free."""
        drafts = Drafts(tokens, len(scheduler.running), plan.num_decodes)
        if tokens == 0:
            self.proposer.skip(plan)
            return drafts
        start = time.perf_counter_ns()
        decodes = plan.slices[: plan.num_decodes]
        rooms = [scheduler.reserve(plan, part, tokens) for part in decodes]
        proposed = self.proposer.propose(plan, rooms, scheduler.pool)
        drafts.draft_ns = time.perf_counter_ns() - start
        drafts.steady = self.proposer.steady
        for part, room, drafted in zip(decodes, rooms, proposed, strict=True):
            if self.padding:
                drafted = [*drafted, *[0] * (room - len(drafted))]
            scheduler.extend(plan, part, drafted)
        return drafts

    def check(self, params: SamplingParams) -> None:
        """Raises EngineError where a request cannot be served together with speculation."""
        if params.forced_tokens is not None:
            raise EngineError("forced_tokens need an engine without --speculate: nothing is left to guess.")
        if params.beams > 1:
            raise EngineError(
                "Beam search needs an engine without --speculate: its tokens are none of a draft's."
            )
        if params.logprobs and not self.proposer.accurate:
            raise EngineError(
                "Synthetic acceptance has no log-probabilities; use --speculate ngram:K for them."
            )

    def describe(self, runner: Runner) -> dict[str, Any]:
        """What the record has of it beside the settings."""
        return {
            "draft_model": self.draft_model,
            "steps_launched_ahead": runner.ahead.used,
            "steps_launched_in_vain": runner.ahead.wasted,
            "not_launched_ahead": self.no_ahead or runner.no_ahead,
        }

    def sampler(self, plan: StepPlan, operations: Operations) -> Callable[[Tensor, SamplingBatch], Tensor]:
        """How the step of `plan` draws its tokens under rejection sampling."""
        if plan.num_drafted == 0:
            return operations.sample
        drafted = [[*part.draft, -1][: part.samples] for part in plan.slices]
        proposed = self.proposer.probabilities(plan)

        def sample(logits: Tensor, sampling: SamplingBatch) -> Tensor:
            tokens = torch.tensor([token for each in drafted for token in each], device=logits.device)
            return verify(probabilities(logits, sampling), tokens, proposed, sampling.noise_key)

        return sample

    def outputs(self, part: Slice, drawn: list[int]) -> list[int]:
        """The tokens a verified slice gives, in order: the accepted drafts and the target's next one.

        drawn: the target's own at each of the slice's positions, the one after its last known token first.
        """
        count = self.proposer.accepted(part, drawn)
        return [*part.draft[:count], drawn[count]]

    def observe(self, drafts: Drafts, seconds: float, *, decodes_only: bool) -> None:
        """Take in a step that has landed; its time counts where neither model computed a prompt."""
        if drafts.asked and drafts.num_decodes:
            self.length.observe_acceptance(drafts.num_decodes, drafts.results)
        if not decodes_only or not drafts.steady:
            return
        if drafts.asked:
            self.length.observe_drafted(drafts.num_running, drafts.asked if drafts.results else 0, seconds)
        else:
            self.length.observe_plain(drafts.num_running, seconds)
