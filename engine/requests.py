"""Requests that are being served: their sequences, and what a step's results mean to each of them.

Forks, beams, stop tokens and strings, and accepted drafts are seen to here; what is computed when is the
scheduler's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from backbench.engine.beams import Beams, num_candidates
from backbench.engine.execution.results import StepInFlight
from backbench.engine.request import SamplingParams, Token, TokenIds, as_token_ids, shown
from backbench.engine.scheduling.scheduler import Scheduler, Slice
from backbench.engine.scheduling.sequence import Sequence
from backbench.engine.scheduling.stopping import StopWatcher
from backbench.engine.speculation.speculator import Drafts, Speculator
from backbench.errors import EngineError


class Requests:
    """All that were added and have not ended, by id."""

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        vocab_size: int,
        end_tokens: frozenset[int],
        tokenizer: Any,
        speculator: Speculator | None,
    ) -> None:
        self._scheduler = scheduler
        self._pool = scheduler.pool
        self._limits = scheduler.limits
        self._vocab_size = vocab_size
        self.end_tokens = end_tokens
        self._tokenizer = tokenizer
        self._speculator = speculator
        self.arrivals = 0
        """Requests added so far."""
        self.peak_beam_blocks = (0, 0)
        """KV blocks that one search would have taken without sharing, at its most, and those it then held."""
        self._sequences: dict[str, list[Sequence]] = {}
        self._unforked: dict[str, Sequence] = {}
        """Requests with n > 1 whose prompt is not computed yet."""
        self._beams: dict[str, Beams] = {}
        """Requests that are beam searches; their sequences in `_sequences` are the live beams."""
        self._watchers: dict[tuple[str, int], StopWatcher] = {}
        """By request and index, for as long as the sequence lives."""

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sequences)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._sequences

    def check(self, request_id: str, prompt: TokenIds, params: SamplingParams) -> list[int]:
        """The prompt's token ids; EngineError where the request can never be served."""
        max_len = self._limits.max_len
        if not isinstance(request_id, str):
            raise EngineError(f"A request's id must be a string, not {shown(request_id)}.")
        named = f"Request {shown(request_id)}"
        if request_id in self:
            raise EngineError(f"{named} is already being served; give each request its own id.")
        token_ids = as_token_ids(prompt, f"{named}, prompt", self._vocab_size)
        if not token_ids:
            raise EngineError(f"{named} has an empty prompt; give at least one token.")
        if self._speculator is not None:
            self._speculator.check(params)
        if params.forced_tokens is not None:
            as_token_ids(params.forced_tokens, f"{named}, forced_tokens", self._vocab_size)
        total = len(token_ids) + params.max_tokens
        if total > max_len:
            raise EngineError(
                f"{named} needs {len(token_ids)} + {params.max_tokens} tokens, more than the "
                f"context of {max_len}; shorten the prompt or max_tokens."
            )
        if params.beams > self._limits.max_seqs:
            raise EngineError(
                f"{named} has {params.beams} beams, more than --max-seqs {self._limits.max_seqs}."
            )
        if params.beams > 1 and num_candidates(params, self.end_tokens) > self._vocab_size:
            raise EngineError(
                f"{named} has {params.beams} beams, too many for a vocabulary of {self._vocab_size}."
            )
        blocks = self._most_blocks(total, params)
        if blocks > self._pool.num_blocks:
            raise EngineError(
                f"{named} needs {blocks} KV blocks, more than the whole pool of "
                f"{self._pool.num_blocks}; raise --num-blocks or shorten the request."
            )
        if params.stop and self._tokenizer is None:
            raise EngineError(
                "Stop strings need a tokenizer; open the engine with one, or use stop_token_ids."
            )
        return token_ids

    def add(self, request_id: str, token_ids: list[int], params: SamplingParams) -> None:
        """Queue a request that was checked."""
        sequence = self._new_sequence(request_id, 0, token_ids, params, self.arrivals)
        self.arrivals += 1
        self._sequences[request_id] = [sequence]
        if params.beams > 1:
            blocks = self._most_blocks(len(token_ids) + params.max_tokens, params)
            self._beams[request_id] = Beams(sequence, self.end_tokens, blocks)
            return
        if params.n > 1:
            self._unforked[request_id] = sequence
        self._scheduler.add(sequence)

    def abort(self, request_id: str) -> None:
        """Drop a request; an unknown or finished one is ignored."""
        beams = self._beams.pop(request_id, None)
        for sequence in self._sequences.pop(request_id, []):
            if sequence.finish_reason is None and (beams is None or beams.started):
                self._scheduler.finish(sequence, "abort")
            self._watchers.pop((request_id, sequence.index), None)
        self._unforked.pop(request_id, None)

    def start_searches(self) -> None:
        """Hand those searches to the scheduler, in order, that fit beside the ones that have started."""
        places, blocks = self._limits.max_seqs, self._pool.num_blocks
        for beams in self._beams.values():
            places -= beams.width
            blocks -= beams.most_blocks
            if places < 0 or blocks < 0:
                return
            if not beams.started:
                beams.started = True
                self._scheduler.add(beams.live[0])

    def landed(
        self,
        step: StepInFlight,
        drafts: Drafts | None,
        tokens: list[int],
        logprobs: list[float] | None,
        top_tokens: list[int] | None,
    ) -> list[Token]:
        """Account for a step and for what `StepInFlight.read` gave of it; the tokens that became visible."""
        visible: list[Token] = []
        sample = 0
        for part in step.plan.slices:
            sequence = part.sequence
            if drafts is not None and part.draft:
                here = slice(sample, sample + part.samples)
                told = None if logprobs is None or top_tokens is None else (logprobs[here], top_tokens[here])
                visible += self._land_drafted(part, drafts, tokens[here], told)
                sample += part.samples
                continue
            sampled = tokens[sample] if part.samples else None
            counts = self._scheduler.land(part, sampled)
            if counts and sequence.num_candidates:
                found = step.candidates(sample, sequence.num_candidates)
                visible += self._advance_beams(sequence, found)
            elif counts:
                assert sampled is not None
                self._fork_if_ready(sequence)
                reason = self._stop_reason(sequence, sampled, len(sequence.token_ids))
                if reason is not None:
                    self._finish(sequence, reason)
                visible.append(
                    Token(
                        sequence.request_id,
                        sequence.index,
                        sampled,
                        None if logprobs is None or not sequence.params.logprobs else logprobs[sample],
                        None if top_tokens is None or not sequence.params.logprobs else top_tokens[sample],
                        reason,
                    )
                )
            sample += part.samples
        return visible

    def _most_blocks(self, total: int, params: SamplingParams) -> int:
        """KV blocks without which a request of `total` tokens may not end.

        Sequences of one prompt can take turns; beams cannot, and may share nothing in the end.
        """
        blocks = -(-(total - 1) // self._pool.block_size)
        return params.beams * blocks if params.beams > 1 else blocks + (params.n > 1)

    def _land_drafted(
        self, part: Slice, drafts: Drafts, drawn: list[int], told: tuple[list[float], list[int]] | None
    ) -> list[Token]:
        """Account for a slice that verified drafts; its tokens, up to one that ends the sequence.

        drawn: the target's tokens at its positions; told: their log-probabilities and the top tokens.
        """
        assert self._speculator is not None
        sequence, visible = part.sequence, list[Token]()
        if sequence.finish_reason is not None:
            self._scheduler.accept(part, [])
            self._scheduler.land(part, drawn[0])
            return visible
        outputs = self._speculator.outputs(part, drawn)
        drafts.results.append((len(part.draft), len(outputs) - 1))
        known = len(sequence.token_ids)
        for i, token in enumerate(outputs):
            reason = self._stop_reason(sequence, token, known + i + 1)
            logprob, top_token = None, None
            if told is not None and sequence.params.logprobs:
                logprob, top_token = told[0][i], told[1][i]
            draft = drafts.results[-1] if i == 0 else None
            visible.append(
                Token(sequence.request_id, sequence.index, token, logprob, top_token, reason, draft)
            )
            if reason is not None:
                break
        self._scheduler.accept(part, outputs[: len(visible) - 1])
        self._scheduler.land(part, visible[-1].token_id)
        self._fork_if_ready(sequence)
        if visible[-1].finish_reason is not None:
            self._finish(sequence, visible[-1].finish_reason)
        return visible

    def _new_sequence(
        self, request_id: str, index: int, prompt: TokenIds, params: SamplingParams, order: int
    ) -> Sequence:
        sequence = Sequence(request_id, index, prompt, params, order)
        if params.stop:
            self._watchers[request_id, index] = StopWatcher(self._tokenizer, params.stop)
        return sequence

    def _fork_if_ready(self, parent: Sequence) -> None:
        if self._unforked.get(parent.request_id) is not parent:
            return
        del self._unforked[parent.request_id]
        prompt = parent.token_ids[: parent.prompt_len]
        family = self._sequences[parent.request_id]
        for index in range(1, parent.params.n):
            family.append(self._new_sequence(parent.request_id, index, prompt, parent.params, parent.order))
        for child in reversed(family[1:]):
            self._scheduler.fork(parent, child)

    def _advance_beams(self, sequence: Sequence, found: list[tuple[int, float]]) -> list[Token]:
        """A beam's next tokens have landed; the search's own once it has ended."""
        request_id, params = sequence.request_id, sequence.params
        beams = self._beams[request_id]
        ended = beams.landed(sequence, found, self._scheduler)
        self._sequences[request_id] = beams.live
        self.peak_beam_blocks = max(self.peak_beam_blocks, beams.blocks())
        if not ended:
            return []
        for each in beams.live:
            self._scheduler.finish(each, "beam dropped")
        del self._sequences[request_id], self._beams[request_id]
        return beams.tokens(request_id, params.n)

    def _stop_reason(self, sequence: Sequence, token: int, known: int) -> str | None:
        """Why `token`, the last of the `known` ones, ends its sequence; None = it does not."""
        params = sequence.params
        num_outputs = known - sequence.prompt_len
        if num_outputs > params.min_tokens:
            if token in params.stop_token_ids or (token in self.end_tokens and not params.ignore_eos):
                return "stop"
            if params.stop and self._watchers[sequence.request_id, sequence.index].push(token):
                return "stop"
        return "length" if num_outputs >= params.max_tokens else None

    def _finish(self, sequence: Sequence, reason: str) -> None:
        self._scheduler.finish(sequence, reason)
        self._watchers.pop((sequence.request_id, sequence.index), None)
        family = self._sequences[sequence.request_id]
        if len(family) == sequence.params.n and all(member.finish_reason for member in family):
            del self._sequences[sequence.request_id]
