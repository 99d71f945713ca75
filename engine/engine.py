"""The reference engine: requests in, tokens out, one step at a time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from backbench.backends.interface import Device, Peers, Selection
from backbench.engine.beams import num_candidates
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
from backbench.engine.request import Completion, SamplingParams, StepStats, Token, TokenIds
from backbench.engine.requests import Requests
from backbench.engine.scheduling.blocks import BlockPool
from backbench.engine.scheduling.scheduler import Scheduler
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
        self.requests = Requests(
            self.scheduler,
            vocab_size=decoder.config.vocab_size,
            end_tokens=frozenset(decoder.config.eos_token_ids),
            tokenizer=tokenizer,
            speculator=speculator,
        )
        self._in_flight: deque[InFlight] = deque()
        """Launched steps, the oldest first."""
        self._last_end_ns = 0
        """When the step before ended: with overlap, the next one's time begins then."""
        self._undelivered: list[Token] = []
        """Tokens of other requests that became visible while `generate` served its own."""
        self._stats: list[StepStats] = []
        self._steps = 0

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
        return bool(self.requests or self._in_flight or self._undelivered)

    def add_request(self, request_id: str, prompt: TokenIds, params: SamplingParams) -> None:
        """Queue a request of token ids. Raises EngineError where it can never be served."""
        token_ids = self.check(request_id, prompt, params)
        self.requests.add(request_id, token_ids, params)

    def abort(self, request_id: str) -> None:
        """Drop a request and its tokens in flight; unknown or finished ones are ignored."""
        self.requests.abort(request_id)
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
            if self.requests:
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
        asked = {f"generate-{self.requests.arrivals}-{i}": prompt for i, prompt in enumerate(prompts)}
        for request_id, prompt in asked.items():
            self.check(request_id, prompt, params)
        others: list[Token] = []
        completions: dict[tuple[str, int], Completion] = {}
        try:
            for request_id, prompt in asked.items():
                self.add_request(request_id, prompt, params)
            while not asked.keys().isdisjoint(self.requests):
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
        candidates = num_candidates(params, self.requests.end_tokens) if params.beams > 1 else 0
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
        self.requests.peak_beam_blocks = (0, 0)
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
            **(self._beam_blocks() if self.requests.peak_beam_blocks[0] else {}),
        }

    def _beam_blocks(self) -> dict[str, int]:
        unshared, held = self.requests.peak_beam_blocks
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
        return self.requests.check(request_id, prompt, params)

    def _land_the_last(self) -> None:
        """With no request left, land what is in flight: an engine without requests is idle."""
        while self._in_flight and not self.requests:
            landed = self._in_flight.popleft()
            self._land(landed)
            self._record(landed)

    def _launch(self, drafted: int) -> bool:
        """Start a step that drafts up to `drafted` tokens a sequence; False where there is nothing to do."""
        start = time.perf_counter_ns()
        self.requests.start_searches()
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
        results = landed.step.read()
        landed.end_ns = time.perf_counter_ns()
        visible = self.requests.landed(landed.step, landed.drafts, *results)
        landed.running, landed.kv_blocks_used = len(self.scheduler.running), self.pool.num_used
        landed.host_ns += time.perf_counter_ns() - landed.end_ns
        return visible

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
