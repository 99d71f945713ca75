"""The reference engine: requests in, tokens out, one step at a time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from backbench.backends.interface import Device, Peers, Selection
from backbench.engine.beams import Beams, num_candidates
from backbench.engine.config import EngineConfig
from backbench.engine.execution.results import StepInFlight
from backbench.engine.execution.runner import Runner, device_seconds
from backbench.engine.limits import EngineLimits, realise_limits
from backbench.engine.models.decoder import Decoder
from backbench.engine.models.on_the_fly import OnTheFly
from backbench.engine.models.weights import Weights
from backbench.engine.parallel.part import Job, open_part
from backbench.engine.parallel.ranks import Ranks
from backbench.engine.parallel.team import Team
from backbench.engine.request import (
    Completion,
    SamplingParams,
    StepStats,
    Token,
    TokenIds,
    as_token_ids,
    shown,
)
from backbench.engine.scheduling.blocks import BlockPool
from backbench.engine.scheduling.scheduler import Scheduler, Slice
from backbench.engine.scheduling.sequence import Sequence
from backbench.engine.scheduling.stopping import StopWatcher
from backbench.engine.speculation.opening import DraftModel, open_speculator
from backbench.engine.speculation.speculator import NO_DRAFTS, Drafts, Speculator
from backbench.engine.warm_up import warm_up
from backbench.errors import EngineError

if TYPE_CHECKING:
    from backbench.engine.models.checkpoint import ModelSource


@dataclass
class InFlight:
    """A launched step, and what is known beside it."""

    step: StepInFlight
    start_ns: int
    host_ns: int
    """The host's time for it so far."""
    waiting: int
    """Requests that waited once it was scheduled."""
    drafts: Drafts | None
    end_ns: int = 0
    """When its tokens were visible."""
    running: int = 0
    """Sequences that ran when it had landed, and KV blocks in use then."""
    kv_blocks_used: int = 0


class Engine:
    """One model on one device behind one backend selection.

    `step` advances every running request; with overlap it launches the next step before it reads the
    oldest one in flight, so the tokens it returns belong to the latter.
    """

    def __init__(
        self,
        decoder: Decoder,
        selection: Selection,
        config: EngineConfig,
        limits: EngineLimits,
        *,
        weights: Weights,
        tokenizer: Any = None,
        max_steps_in_flight: int = 1,
        speculator: Speculator | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """`limits`: what `config` left open, decided; see `Engine.open`. `ranks`: the other devices'."""
        self.selection = selection
        self.config = replace(
            config, block_size=limits.block_size, num_blocks=limits.num_blocks, max_len=limits.max_len
        )
        """What was asked for, with the sizes that were left open."""
        self.limits = limits
        self.model_config = decoder.config
        self.weights = weights
        self.tokenizer = tokenizer
        self.max_steps_in_flight = max_steps_in_flight
        self.decoder = decoder
        lookahead = 0 if speculator is None else speculator.proposer.lookahead
        self.pool = BlockPool(limits.num_blocks, limits.block_size, config.prefix_cache, lookahead)
        self.scheduler = Scheduler(self.pool, limits, max_steps_in_flight if config.pp > 1 else 1)
        self.ranks = ranks
        self.runner = Runner(
            decoder,
            selection.operations,
            limits,
            graphs=config.graphs and config.speculation_sampling == "exact",
            queue=None if ranks is None else ranks.queue,
            followers=ranks,
            pipe=None if ranks is None else ranks.part.pipe,
        )
        if ranks is not None:
            ranks.lead(self.runner)
        self.speculator = speculator
        self.peak_blocks_used = 0
        self._requests: dict[str, list[Sequence]] = {}
        self._unforked: dict[str, Sequence] = {}
        """Requests with n > 1 whose prompt is not computed yet."""
        self._beams: dict[str, Beams] = {}
        """Requests that are beam searches; their sequences in `_requests` are the live beams."""
        self.peak_beam_blocks = (0, 0)
        """KV blocks that one search would have taken without sharing, at its most, and those it then held."""
        self._watchers: dict[tuple[str, int], StopWatcher] = {}
        """By request and index, for as long as the sequence lives."""
        self._in_flight: deque[InFlight] = deque()
        """Launched steps, the oldest first."""
        self._last_end_ns = 0
        """When the step before ended: with overlap, the next one's time begins then."""
        self._undelivered: list[Token] = []
        """Tokens of other requests that became visible while `generate` served its own."""
        self._stats: list[StepStats] = []
        self._arrivals = 0
        self._steps = 0
        self._eos = frozenset(decoder.config.eos_token_ids)

    @classmethod
    def open(
        cls,
        source: ModelSource,
        *,
        backend: str,
        device: Device,
        dtype: torch.dtype | None = None,
        config: EngineConfig | None = None,
        overrides: Mapping[str, str] | None = None,
        weights: Weights | None = None,
        tokenizer: Any = None,
        team: Team | None = None,
    ) -> Engine:
        """Load `source` and size the engine for `device`, or for `config.num_devices` from it on.

        dtype: None = fp32 on a CPU, else the checkpoint's. weights: share those of another engine on one
        device. team: the processes of the other devices, which outlive the engine; None = its own.
        Raises EngineError or BackendError with one line saying what is wrong.
        """
        config = config or EngineConfig()
        if (change := OnTheFly.asked(config)) is not None and change != source.config.on_the_fly:
            source = source.on_the_fly(change)
        model = source.config
        if weights is None and model.on_the_fly is not None:
            model.on_the_fly.require_norms()
        on_cpu = device.torch_device.type == "cpu"
        dtype = dtype or (torch.float32 if on_cpu else source.config.dtype)
        speculation = config.speculation
        draft = None
        if speculation is not None and speculation.model is not None:
            draft = DraftModel.open(
                speculation,
                model,
                backend=backend,
                device=device,
                dtype=dtype,
                limits=realise_limits(config, model, device),
                overrides=overrides,
            )
        job = Job(source, backend, dtype, config, dict(overrides or {}))
        beside, tap = (0, None) if draft is None else (draft.decoder.cache_bytes_per_block(), draft.tap)
        if config.num_devices == 1:
            ranks = None
            peers = Peers(0, 1, device)
            part = open_part(job, peers, weights, drafting_bytes_per_block=beside, tap=tap)
        else:
            ranks = Ranks(job, config.num_devices, device, team, drafting_bytes_per_block=beside)
            part = ranks.part
        overlapped = config.overlap and (config.pp > 1 or not on_cpu)
        return cls(
            part.decoder,
            part.selection,
            config,
            part.limits,
            weights=part.weights,
            tokenizer=tokenizer,
            max_steps_in_flight=max(2, config.pp) if overlapped else 1,
            speculator=open_speculator(config, part.limits, part.decoder, draft),
            ranks=ranks,
        )

    def close(self) -> None:
        """End the other devices' processes, if there are any; the engine serves nothing after."""
        if self.ranks is not None:
            self.ranks.close(self.runner)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def has_work(self) -> bool:
        """True while any request is unfinished, any step in flight or any token to be returned."""
        return bool(self._requests or self._in_flight or self._undelivered)

    def add_request(self, request_id: str, prompt: TokenIds, params: SamplingParams) -> None:
        """Queue a request of token ids. Raises EngineError where it can never be served."""
        token_ids = self.check(request_id, prompt, params)
        sequence = self._new_sequence(request_id, 0, token_ids, params, self._arrivals)
        self._arrivals += 1
        self._requests[request_id] = [sequence]
        if params.beams > 1:
            blocks = self._most_blocks(len(token_ids) + params.max_tokens, params)
            self._beams[request_id] = Beams(sequence, self._eos, blocks)
            return
        if params.n > 1:
            self._unforked[request_id] = sequence
        self.scheduler.add(sequence)

    def abort(self, request_id: str) -> None:
        """Drop a request and its tokens in flight; unknown or finished ones are ignored."""
        beams = self._beams.pop(request_id, None)
        for sequence in self._requests.pop(request_id, []):
            if sequence.finish_reason is None and (beams is None or beams.started):
                self.scheduler.finish(sequence, "abort")
            self._watchers.pop((request_id, sequence.index), None)
        self._unforked.pop(request_id, None)
        self._undelivered = [token for token in self._undelivered if token.request_id != request_id]
        self._land_the_last()

    def step(self) -> list[Token]:
        """Advance by one step; returns the tokens that became visible, at least one step's worth in order.

        Steps may be under way when it returns, which know nothing of what is added or aborted afterwards.
        """
        try:
            return self._advance()
        except BaseException:
            self.runner.disarm()
            raise

    def _advance(self) -> list[Token]:
        if self._undelivered:
            visible, self._undelivered = self._undelivered, []
            return visible
        while self._may_launch(drafted := self._drafted_tokens()):
            if not self._launch(drafted):
                break
        if not self._in_flight:
            if self._requests:
                raise EngineError(
                    "No request can make progress; this is a scheduler defect, please report it."
                )
            return []
        if self.speculator is not None:
            self._arm(self.speculator)
        landed = self._in_flight.popleft()
        visible = self._land(landed)
        # A device that waits at a gate comes before everything else.
        if self.runner.ahead.armed is not None and not self._launch(self._drafted_tokens()):
            self.runner.disarm()
        self._record(landed)
        self._land_the_last()
        return visible

    def _may_launch(self, drafted: int) -> bool:
        """Whether one more step may be under way: drafts need every token known, and so does what follows."""
        alone = drafted or any(each.drafts and each.drafts.asked for each in self._in_flight)
        return len(self._in_flight) < (1 if alone else self.max_steps_in_flight)

    def _drafted_tokens(self) -> int:
        """Tokens to draft for a sequence in the next step."""
        return 0 if self.speculator is None else self.speculator.choose(len(self.scheduler.running))

    def generate(self, prompts: Iterable[TokenIds], params: SamplingParams) -> list[Completion]:
        """Serve token-id prompts together and block until all are done; n completions a prompt, in order.

        Other requests are served meanwhile; their tokens are what `step` returns next.
        """
        asked = {f"generate-{self._arrivals}-{i}": prompt for i, prompt in enumerate(prompts)}
        for request_id, prompt in asked.items():
            self.check(request_id, prompt, params)
        others: list[Token] = []
        completions: dict[tuple[str, int], Completion] = {}
        try:
            for request_id, prompt in asked.items():
                self.add_request(request_id, prompt, params)
            while not asked.keys().isdisjoint(self._requests):
                for token in self.step():
                    if token.request_id not in asked:
                        others.append(token)
                        continue
                    key = (token.request_id, token.sequence)
                    completions.setdefault(key, Completion(*key)).append(token)
        finally:
            for request_id in asked:
                self.abort(request_id)
            self._undelivered = others + self._undelivered
        for done in completions.values():
            if self.tokenizer is not None:
                done.text = self.tokenizer.decode(done.token_ids)
        return [completions[request_id, index] for request_id in asked for index in range(params.n)]

    def warm_up(self, params: SamplingParams | None = None) -> float:
        """Compile and capture every launch that requests like `params` can need; returns the seconds it took.

        Leaves no request, no statistics and an empty prefix cache behind.
        """
        if self.has_work:
            raise EngineError("warm_up needs an idle engine; finish or abort its requests first.")
        start, params = device_seconds(), params or SamplingParams()
        candidates = num_candidates(params, self._eos) if params.beams > 1 else 0
        warm_up(self.runner, self.speculator, params, candidates, self.generate)
        self.reset_prefix_cache()
        self.reset_counts()
        return device_seconds() - start

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix, so that a run starts cold."""
        self.pool.reset_prefix_cache()

    def reset_counts(self) -> None:
        """Forget statistics, counts and peaks of what was served, so that those of a run are its own."""
        self._stats.clear()
        self._steps = 0
        self.scheduler.preemptions = 0
        if self.speculator is not None:
            self.speculator.length.reset()
        self.peak_blocks_used = 0
        self.peak_beam_blocks = (0, 0)
        self.runner.graph_misses = 0
        self.runner.ahead.reset_counts()

    def take_step_stats(self) -> list[StepStats]:
        """Statistics of the steps landed since the last call."""
        stats, self._stats = self._stats, []
        return stats

    def describe(self) -> dict[str, Any]:
        """Every setting and what came of it, for the record."""
        return {
            **asdict(self.config),
            "max_steps_in_flight": self.max_steps_in_flight,
            "graphs_captured": self.runner.num_graphs,
            "graph_misses": self.runner.graph_misses,
            "preemptions": self.scheduler.preemptions,
            **({} if self.speculator is None else self.speculator.describe(self.runner)),
            **(self._beam_blocks() if self.peak_beam_blocks[0] else {}),
        }

    def _beam_blocks(self) -> dict[str, int]:
        unshared, held = self.peak_beam_blocks
        return {"beam_blocks_peak": held, "beam_blocks_peak_unshared": unshared}

    def memory(self) -> dict[str, int]:
        """Bytes of the weights, held and read a step, and of the KV pool, reserved and used at its peak."""
        per_block, drafting_bytes = self.decoder.cache_bytes_per_block(), 0
        if self.speculator is not None:
            drafting_bytes, drafting_per_block = self.speculator.proposer.memory()
            per_block += drafting_per_block
        return {
            "weights_bytes": self.weights.num_bytes + drafting_bytes,
            "weights_read_bytes": self.weights.streamed_bytes,
            "kv_pool_bytes": per_block * self.pool.num_blocks,
            "kv_used_peak_bytes": per_block * self.peak_blocks_used,
        }

    def memory_by_device(self) -> list[dict[str, Any]]:
        """Bytes on each device, by rank; empty where there is one."""
        if self.ranks is None:
            return []
        first, *others = self.ranks.memory(self.runner)
        own = self.memory()  # which has the model that drafts, too
        return [first | {name: own[name] for name in ("weights_bytes", "kv_pool_bytes")}, *others]

    def check(self, request_id: str, prompt: TokenIds, params: SamplingParams) -> list[int]:
        """The prompt's token ids; EngineError where the request can never be served."""
        max_len, vocab = self.limits.max_len, self.model_config.vocab_size
        if not isinstance(request_id, str):
            raise EngineError(f"A request's id must be a string, not {shown(request_id)}.")
        named = f"Request {shown(request_id)}"
        if request_id in self._requests:
            raise EngineError(f"{named} is already being served; give each request its own id.")
        token_ids = as_token_ids(prompt, f"{named}, prompt", vocab)
        if not token_ids:
            raise EngineError(f"{named} has an empty prompt; give at least one token.")
        if self.speculator is not None:
            self.speculator.check(params)
        if params.forced_tokens is not None:
            as_token_ids(params.forced_tokens, f"{named}, forced_tokens", vocab)
        total = len(token_ids) + params.max_tokens
        if total > max_len:
            raise EngineError(
                f"{named} needs {len(token_ids)} + {params.max_tokens} tokens, more than the "
                f"context of {max_len}; shorten the prompt or max_tokens."
            )
        if params.beams > self.limits.max_seqs:
            raise EngineError(
                f"{named} has {params.beams} beams, more than --max-seqs {self.limits.max_seqs}."
            )
        if params.beams > 1 and num_candidates(params, self._eos) > vocab:
            raise EngineError(f"{named} has {params.beams} beams, too many for a vocabulary of {vocab}.")
        blocks = self._most_blocks(total, params)
        if blocks > self.pool.num_blocks:
            raise EngineError(
                f"{named} needs {blocks} KV blocks, more than the whole pool of "
                f"{self.pool.num_blocks}; raise --num-blocks or shorten the request."
            )
        if params.stop and self.tokenizer is None:
            raise EngineError(
                "Stop strings need a tokenizer; open the engine with one, or use stop_token_ids."
            )
        return token_ids

    def _most_blocks(self, total: int, params: SamplingParams) -> int:
        """KV blocks without which a request of `total` tokens may not end.

        Sequences of one prompt can take turns; beams cannot, and may share nothing in the end.
        """
        blocks = -(-(total - 1) // self.pool.block_size)
        return params.beams * blocks if params.beams > 1 else blocks + (params.n > 1)

    def _start_searches(self) -> None:
        """Hand those searches to the scheduler, in order, that fit beside the ones that have started."""
        places, blocks = self.limits.max_seqs, self.pool.num_blocks
        for beams in self._beams.values():
            places -= beams.width
            blocks -= beams.most_blocks
            if places < 0 or blocks < 0:
                return
            if not beams.started:
                beams.started = True
                self.scheduler.add(beams.live[0])

    def _land_the_last(self) -> None:
        """With no request left, land what is in flight: an engine without requests is idle."""
        while self._in_flight and not self._requests:
            landed = self._in_flight.popleft()
            self._land(landed)
            self._record(landed)

    def _launch(self, drafted: int) -> bool:
        """Start a step that drafts up to `drafted` tokens a sequence; False where there is nothing to do."""
        start = time.perf_counter_ns()
        if self._beams:
            self._start_searches()
        plan = self.scheduler.schedule()
        if not plan.slices:
            return False
        drafts = None
        if self.speculator is not None:
            drafts = self.speculator.draft(plan, drafted, self.scheduler)
            if self.speculator.rejection:
                self.runner.sample = self.speculator.sampler(plan, self.selection.operations)
        self.peak_blocks_used = max(self.peak_blocks_used, self.pool.num_used)
        wasted = self.runner.ahead.wasted
        step = self.runner.launch(plan)
        if drafts is not None and drafts.asked:
            self.runner.ahead.saw(step.graph)
        elif drafts is not None and self.runner.ahead.wasted > wasted:
            drafts.steady = False  # it follows a step in vain, which is no cost of its own
        host_ns = time.perf_counter_ns() - start + step.armed_ns
        self._in_flight.append(InFlight(step, start, host_ns, len(self.scheduler.waiting), drafts))
        return True

    def _arm(self, speculator: Speculator) -> None:
        """Launch the next step ahead where it will most likely replay the graph of the one in flight."""
        if speculator.no_ahead or self.runner.no_ahead or not self.runner.ahead.likely:
            return
        if len(self._in_flight) > 1 or self.scheduler.waiting:
            return
        step, drafts = self._in_flight[0].step, self._in_flight[0].drafts
        if step.graph is None or drafts is None:
            return
        least = speculator.next_shape(step.plan, drafts)
        if least and self.runner.captured_shape(least, decodes=True) == step.inputs.shape:
            self.runner.arm(step)

    def _land(self, landed: InFlight) -> list[Token]:
        """Wait for a step and account for it; the tokens it brought."""
        step, drafts = landed.step, landed.drafts
        tokens, logprobs, top_tokens = step.read()
        landed.end_ns = time.perf_counter_ns()
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
            counts = self.scheduler.land(part, sampled)
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
        landed.running, landed.kv_blocks_used = len(self.scheduler.running), self.pool.num_used
        landed.host_ns += time.perf_counter_ns() - landed.end_ns
        return visible

    def _land_drafted(
        self, part: Slice, drafts: Drafts, drawn: list[int], told: tuple[list[float], list[int]] | None
    ) -> list[Token]:
        """Account for a slice that verified drafts; its tokens, up to one that ends the sequence.

        drawn: the target's tokens at its positions; told: their log-probabilities and the top tokens.
        """
        assert self.speculator is not None
        sequence, visible = part.sequence, list[Token]()
        if sequence.finish_reason is not None:
            self.scheduler.accept(part, [])
            self.scheduler.land(part, drawn[0])
            return visible
        outputs = self.speculator.outputs(part, drawn)
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
        self.scheduler.accept(part, outputs[: len(visible) - 1])
        self.scheduler.land(part, visible[-1].token_id)
        self._fork_if_ready(sequence)
        if visible[-1].finish_reason is not None:
            self._finish(sequence, visible[-1].finish_reason)
        return visible

    def _new_sequence(
        self, request_id: str, index: int, prompt: TokenIds, params: SamplingParams, order: int
    ) -> Sequence:
        sequence = Sequence(request_id, index, prompt, params, order)
        if params.stop:
            self._watchers[request_id, index] = StopWatcher(self.tokenizer, params.stop)
        return sequence

    def _fork_if_ready(self, parent: Sequence) -> None:
        if self._unforked.get(parent.request_id) is not parent:
            return
        del self._unforked[parent.request_id]
        prompt = parent.token_ids[: parent.prompt_len]
        family = self._requests[parent.request_id]
        for index in range(1, parent.params.n):
            family.append(self._new_sequence(parent.request_id, index, prompt, parent.params, parent.order))
        for child in reversed(family[1:]):
            self.scheduler.fork(parent, child)

    def _advance_beams(self, sequence: Sequence, found: list[tuple[int, float]]) -> list[Token]:
        """A beam's next tokens have landed; the search's own once it has ended."""
        request_id, params = sequence.request_id, sequence.params
        beams = self._beams[request_id]
        ended = beams.landed(sequence, found, self.scheduler)
        self._requests[request_id] = beams.live
        self.peak_beam_blocks = max(self.peak_beam_blocks, beams.blocks())
        if not ended:
            return []
        for each in beams.live:
            self.scheduler.finish(each, "beam dropped")
        del self._requests[request_id], self._beams[request_id]
        return beams.tokens(request_id, params.n)

    def _stop_reason(self, sequence: Sequence, token: int, known: int) -> str | None:
        """Why `token`, the last of the `known` ones, ends its sequence; None = it does not."""
        params = sequence.params
        num_outputs = known - sequence.prompt_len
        if num_outputs > params.min_tokens:
            if token in params.stop_token_ids or (token in self._eos and not params.ignore_eos):
                return "stop"
            if params.stop and self._watchers[sequence.request_id, sequence.index].push(token):
                return "stop"
        return "length" if num_outputs >= params.max_tokens else None

    def _finish(self, sequence: Sequence, reason: str) -> None:
        self.scheduler.finish(sequence, reason)
        self._watchers.pop((sequence.request_id, sequence.index), None)
        family = self._requests[sequence.request_id]
        if len(family) == sequence.params.n and all(member.finish_reason for member in family):
            del self._requests[sequence.request_id]

    def _record(self, landed: InFlight) -> None:
        step, plan = landed.step, landed.step.plan
        decodes, drafted = plan.num_decodes, NO_DRAFTS
        if self.speculator is not None and landed.drafts is not None:
            drafted = landed.drafts
            seconds = (landed.end_ns - max(landed.start_ns, self._last_end_ns)) / 1e9
            self.speculator.observe(drafted, seconds, decodes_only=decodes == len(plan.slices))
        self._last_end_ns = landed.end_ns
        self._stats.append(
            StepStats(
                step=self._steps,
                start_ns=landed.start_ns,
                end_ns=landed.end_ns,
                host_ns=landed.host_ns,
                num_seqs=len(plan.slices),
                num_tokens=plan.num_tokens,
                num_prefill_tokens=plan.num_tokens - plan.num_drafted - decodes,
                num_decodes=decodes,
                context_tokens=step.inputs.context_tokens,
                running=landed.running,
                waiting=landed.waiting,
                kv_blocks_used=landed.kv_blocks_used,
                kv_blocks_total=self.pool.num_blocks,
                prefix_hit_tokens=plan.prefix_hit_tokens,
                preemptions=plan.preemptions,
                graph=step.graph is not None,
                device_ns=step.device_ns,
                draft_ns=drafted.draft_ns,
                draft_lengths=tuple(length for length, _ in drafted.results),
                accepted_lengths=tuple(count for _, count in drafted.results),
            )
        )
        self._steps += 1
