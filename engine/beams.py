"""Beam search: which continuations of a prompt are kept, and the sequences that compute them.

`BeamSearch` is the choice alone, as transformers makes it (`early_stopping=False`). `Beams` carries it out on
the engine's sequences: a beam that goes on in several ways is forked, so that what they share is held once.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import TYPE_CHECKING

from backbench.engine.request import SamplingParams, Token
from backbench.engine.scheduling.sequence import Sequence

if TYPE_CHECKING:
    from backbench.engine.scheduling.scheduler import Scheduler

Candidates = list[tuple[int, float]]
"""(token, its log-probability) of the most likely continuations of a beam, the most likely first."""


@dataclass(frozen=True)
class Hypothesis:
    """One continuation of the prompt."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    logprob: float = 0.0
    """Sum of `logprobs`."""
    stopped: bool = False
    """It ended with a token that ends a sequence, not at the most tokens asked for."""

    def then(self, token: int, logprob: float, stopped: bool) -> Hypothesis:
        """With one more token."""
        return Hypothesis(
            (*self.token_ids, token), (*self.logprobs, logprob), self.logprob + logprob, stopped
        )

    def score(self, length_penalty: float) -> float:
        """What finished ones are ranked by: log-probability / length ** length_penalty."""
        return self.logprob / len(self.token_ids) ** length_penalty


def ending(params: SamplingParams, end_tokens: frozenset[int]) -> frozenset[int]:
    """The tokens that end a sequence, of a model that has these `end_tokens`."""
    return frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else end_tokens)


def num_candidates(params: SamplingParams, end_tokens: frozenset[int]) -> int:
    """Continuations that a search looks at, of each beam: so many go on though each may end in every way."""
    return _num_candidates(params.beams, len(ending(params, end_tokens)))


def _num_candidates(width: int, num_end_tokens: int) -> int:
    return max(2, 1 + num_end_tokens) * width


class BeamSearch:
    """The hypotheses of one prompt: those that go on, best first, and the best that have ended."""

    def __init__(
        self,
        width: int,
        max_tokens: int,
        *,
        end_tokens: frozenset[int] = frozenset(),
        length_penalty: float = 1.0,
    ) -> None:
        self.width = width
        self.max_tokens = max_tokens
        self.end_tokens = end_tokens
        self.length_penalty = length_penalty
        self.live = [Hypothesis()]
        self.finished: list[tuple[float, Hypothesis]] = []
        """(score, hypothesis), best first, `width` at most."""

    def advance(self, candidates: list[Candidates]) -> list[tuple[int, int]]:
        """Take one more token, given the candidates of each live hypothesis, in order.

        Returns (index of the hypothesis it continues, token) of each that goes on, best first; nothing where
        the search has ended. A hypothesis that ends is kept only if it is among the `width` best
        continuations.
        """
        options = [
            (hypothesis.logprob + logprob, parent, token, logprob)
            for parent, (hypothesis, each) in enumerate(zip(self.live, candidates, strict=True))
            for token, logprob in each
        ]
        kept = _num_candidates(self.width, len(self.end_tokens))
        best = heapq.nlargest(kept, options, key=lambda option: option[0])
        length = len(self.live[0].token_ids) + 1
        going_on: list[tuple[int, int]] = []
        live: list[Hypothesis] = []
        for rank, (_, parent, token, logprob) in enumerate(best):
            stopped = token in self.end_tokens
            if not stopped and length < self.max_tokens:
                if len(live) < self.width:
                    live.append(self.live[parent].then(token, logprob, stopped))
                    going_on.append((parent, token))
            elif rank < self.width:
                ended = self.live[parent].then(token, logprob, stopped)
                self.finished.append((ended.score(self.length_penalty), ended))
        self.finished.sort(key=lambda each: -each[0])
        del self.finished[self.width :]
        self.live = live
        if not live or not self._can_improve():
            self.live = []
            return []
        return going_on

    def _can_improve(self) -> bool:
        """Whether the best live hypothesis, as long as it is now, beats the worst of `width` finished ones.

        That it might score better once it is longer is left out, as transformers does.
        """
        if len(self.finished) < self.width:
            return True
        return self.live[0].score(self.length_penalty) > self.finished[-1][0]


class Beams:
    """One request's search on the engine's sequences. A sequence waits for the others after every token.

    What waits keeps its place and its blocks, so a search starts only once it can have all it may need beside
    the other searches: two that each held half would wait for ever.
    """

    def __init__(self, first: Sequence, end_tokens: frozenset[int], blocks: int) -> None:
        """`first` holds the prompt, and is not scheduled yet; `blocks`: KV blocks of the search at its
        most."""
        params = first.params
        self.width = params.beams
        self.most_blocks = blocks
        self.started = False
        """Whether the scheduler knows of it."""
        self.search = BeamSearch(
            params.beams,
            params.max_tokens,
            end_tokens=ending(params, end_tokens),
            length_penalty=params.length_penalty,
        )
        self.num_candidates = num_candidates(params, end_tokens)
        self.live = [first]
        self._candidates: dict[Sequence, Candidates] = {}
        first.num_candidates = self.num_candidates
        first.end_len = first.num_tokens + 1

    def landed(self, sequence: Sequence, candidates: Candidates, scheduler: Scheduler) -> bool:
        """Hear of a sequence's next tokens; once all are heard of, go on. True when the search has ended.

        The token that the engine appended is taken back: which one it is is decided here, and until then
        there is nothing to compute.
        """
        sequence.token_ids.pop()
        sequence.num_tokens -= 1
        sequence.end_len = sequence.num_tokens
        self._candidates[sequence] = candidates
        # One that was preempted while it waited computes its tokens again and hears of the same candidates:
        # while a token of its is being sampled (it counts more tokens than it knows), that is waited for.
        if any(each not in self._candidates or each.num_tokens > len(each.token_ids) for each in self.live):
            return False
        chosen = self.search.advance([self._candidates[each] for each in self.live])
        self._candidates.clear()
        if chosen:
            self._go_on(chosen, scheduler)
        return not chosen

    def blocks(self) -> tuple[int, int]:
        """KV blocks of the live beams: as many as there would be without sharing, and those there are."""
        held = [block for each in self.live for block in each.blocks]
        return len(held), len(set(held))

    def tokens(self, request_id: str, n: int) -> list[Token]:
        """The n best finished hypotheses, best first, with the log-probability of each token."""
        return [
            Token(
                request_id,
                rank,
                token,
                logprob,
                None,
                ("stop" if found.stopped else "length") if i == len(found.token_ids) - 1 else None,
            )
            for rank, (_, found) in enumerate(self.search.finished[:n])
            for i, (token, logprob) in enumerate(zip(found.token_ids, found.logprobs, strict=True))
        ]

    def _go_on(self, chosen: list[tuple[int, int]], scheduler: Scheduler) -> None:
        """A beam's first continuation is its own; the others are forks, and a beam without any is dropped.

        Dropped ones go first, so that their places are free, and forks are made before their parent grows.
        """
        parents = {parent for parent, _ in chosen}
        for index, sequence in enumerate(self.live):
            if index not in parents:
                scheduler.finish(sequence, "beam dropped")
        live, growing = [], []
        for parent, token in chosen:
            sequence = self.live[parent]
            if parent in parents:
                parents.remove(parent)
                growing.append((sequence, token))
            else:
                sequence = self._fork(sequence, token, scheduler)
            live.append(sequence)
        for sequence, token in growing:
            sequence.token_ids.append(token)
            sequence.num_tokens += 1
            sequence.end_len = sequence.num_tokens + 1
        self.live = live

    def _fork(self, parent: Sequence, token: int, scheduler: Scheduler) -> Sequence:
        prompt = [*parent.token_ids, token]
        child = Sequence(parent.request_id, parent.index, prompt, parent.params, parent.order)
        child.num_candidates = self.num_candidates
        child.end_len = child.num_tokens + 1
        scheduler.fork(parent, child)
        return child
