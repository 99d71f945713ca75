"""Runs steps on the device: inputs in, one forward pass, sampled tokens on their way back.

Nothing here waits for the device except `StepInFlight.read`. Decodes, and steps with few prompt tokens,
replay a captured graph where the backend allows it; a graph is keyed by every host integer its launches
bake in. A step with drafts may be launched before its inputs are known (`ahead`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from backbench.backends.interface import Batch, Operations, SamplingBatch
from backbench.engine.execution.ahead import Ahead, Armed
from backbench.engine.execution.device_queue import DeviceQueue
from backbench.engine.execution.results import HostRows, Launched, StepInFlight, StepOutput
from backbench.engine.execution.step_buffers import RequestTables, Staging, StepBuffers, StepInputs
from backbench.engine.execution.step_shape import FEW_DRAFTED, StepShape, max_len_ladder
from backbench.engine.limits import EngineLimits
from backbench.engine.models.decoder import Decoder
from backbench.engine.parallel.pipe import Pipe
from backbench.engine.scheduling.scheduler import StepPlan
from backbench.errors import EngineError


class Followers(Protocol):
    """Other ranks, whose runners do what this one does, at the same time and in the same order."""

    def step(self, filled: Staging, inputs: StepInputs, captured: bool) -> None:
        """Have them `Runner.follow` a step of these inputs."""

    def capture(self, sampled: bool, filtered: bool, logprobs: bool, candidates: int) -> None:
        """Have them `Runner.capture`."""


class Runner:
    """Owns the device's request tables, the KV caches, the step buffers and the captured graphs."""

    ids_ahead = 0
    """A token is computed with the id of the one so many places after it."""

    def __init__(
        self,
        decoder: Decoder,
        operations: Operations,
        limits: EngineLimits,
        *,
        graphs: bool,
        queue: DeviceQueue | None = None,
        followers: Followers | None = None,
        pipe: Pipe | None = None,
    ) -> None:
        """graphs: capture where the backend allows it. queue: None = the device's own. followers: None = no
        other rank waits for this one. pipe: None = this device has all layers."""
        self.decoder = decoder
        self.followers = followers
        self.pipe = pipe
        self.operations = operations
        self.sample: Callable[[Tensor, SamplingBatch], Tensor] = operations.sample
        """Draws the tokens; rejection sampling puts its own in its place, where nothing is captured."""
        self.limits = limits
        device = decoder.device.torch_device
        self.queue = queue or DeviceQueue(device)
        try:
            self.caches = decoder.new_caches(limits.num_blocks)
        except torch.cuda.OutOfMemoryError:
            gib = limits.num_blocks * decoder.cache_bytes_per_block() / 2**30
            raise EngineError(
                f"A pool of {limits.num_blocks} KV blocks, {gib:.1f} GiB, does not fit beside the weights; "
                "lower --num-blocks or --kv-memory-fraction."
            ) from None
        captured = graphs and device.type == "cuda" and decoder.communicator.capturable
        self._shapes = limits.captured_shapes(decoder.graph_support) if captured else []
        self.few_drafted = FEW_DRAFTED if limits.draft_tokens >= decoder.few_queries else 0
        """Tokens of a captured step with drafts up to which each is laid out as a decode of its own."""
        tables = RequestTables(limits, device)
        largest = max((shape.num_tokens for shape in self._shapes), default=1)
        # With as many no step in flight has to end before the next is filled.
        stagings = 2 if pipe is None else max(2, pipe.num_stages - 1)
        options = {"num_stagings": stagings, "ids_ahead": self.ids_ahead}
        self._eager = StepBuffers(limits, tables, device, self.queue, **options)
        self._captured = StepBuffers(limits, tables, device, self.queue, largest, **options)
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, StepOutput | None]] = {}
        self._batches: dict[StepShape, Batch] = {}
        self._max_lens = max_len_ladder(limits.max_len)
        self._plans: dict[tuple[StepShape, int], Hashable] = {}
        """The decoder's, by a captured shape and one of these."""
        self._rows = HostRows(pinned=device.type != "cpu")
        self.ahead = Ahead()
        self.graph_misses = 0
        """Steps of a shape that is captured which found no graph of their kind and ran eagerly."""

    @property
    def graphs_enabled(self) -> bool:
        """True where steps of some shapes replay graphs."""
        return bool(self._shapes)

    @property
    def largest_step(self) -> tuple[int, int]:
        """Elements of the i64 and of the f32 array that the largest step is filled into."""
        filled = self._eager.filled
        return filled.integers.numel(), filled.floats.numel()

    @property
    def num_graphs(self) -> int:
        """Graphs captured so far."""
        return len(self._graphs)

    @property
    def no_ahead(self) -> str | None:
        """Why `arm` is not to be had; None = it is."""
        if self.followers is not None:
            return "other devices follow step by step"
        if not self.graphs_enabled:
            return "no steps are captured"
        return self.queue.no_gates

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> StepInFlight:
        """Start a step; returns at once on a GPU."""
        shape = self._captured_shape(plan)
        if (armed := self.ahead.armed) is not None:
            inputs = self._written(armed, plan, shape)
            if inputs is not None:
                self.ahead.use()
                return StepInFlight(plan, inputs, armed.launched, armed.host_ns)
            self.disarm()
        buffers = self._eager if shape is None else self._captured
        inputs = buffers.fill(plan, shape)
        if self.followers is not None:
            self.followers.step(buffers.filled, inputs, shape is not None)
        return StepInFlight(plan, inputs, self._start(buffers, inputs))

    @torch.inference_mode()
    def arm(self, like: StepInFlight) -> None:
        """Launch the graph of `like`, the last step launched, once more ahead of its inputs.

        Until `launch` or `disarm` nothing may wait for the device but `like.read`, nor allocate its memory.
        """
        start = time.perf_counter_ns()
        assert like.graph is not None and self.ahead.armed is None
        inputs = self._captured.fill_inert(like.inputs.shape)
        output = self._graphs[like.graph][1]
        assert output is not None, "no stage follows another's guesses"
        self._rows.reserve(output.of_tokens, inputs.num_samples)
        gate = self.queue.gate()
        try:
            self._captured.upload(inputs)
            replay = partial(self._replay, like.graph)
            launched = self._submit(replay, inputs.num_samples, like.graph, inputs.shape.num_tokens)
        except BaseException:
            gate.open()
            raise
        host_ns = time.perf_counter_ns() - start
        self.ahead.armed = Armed(inputs, self._captured.filled, launched, gate, host_ns)

    def disarm(self) -> None:
        """Let the armed step pass, if there is one: it computes nothing anyone reads."""
        if (armed := self.ahead.armed) is not None:
            self._captured.fill_inert(armed.inputs.shape, armed.staging)
            self.ahead.waste()

    def _written(self, armed: Armed, plan: StepPlan, shape: StepShape | None) -> StepInputs | None:
        """Write `plan` where the armed step reads its inputs; None where it would take another step."""
        if shape != armed.inputs.shape or plan.copies:
            return None
        inputs = self._captured.fill(plan, shape, armed.staging)
        graph = self._graph_key(inputs)
        return inputs if graph == armed.launched.graph and inputs.more_updates is None else None

    @torch.inference_mode()
    def follow(self, integers: np.ndarray, floats: np.ndarray, inputs: StepInputs, captured: bool) -> None:
        """Start a step as another rank has filled it; returns at once on a GPU."""
        buffers = self._captured if captured else self._eager
        buffers.take(integers, floats)
        self._start(buffers, inputs)

    def _start(self, buffers: StepBuffers, inputs: StepInputs) -> Launched:
        """Upload what was filled last and launch."""
        buffers.upload(inputs)
        graph = None
        if buffers is self._eager:
            batch = buffers.batch(inputs)
        else:
            batch = self._batch(inputs)
            graph = self._graph_key(inputs)
            if self._graphs.get(graph) is None:
                self.graph_misses += 1
                graph = None

        def compute() -> StepOutput | None:
            if inputs.num_copies:
                self.decoder.copy_blocks(self.caches, *buffers.copies(inputs))
            return self._compute(buffers, inputs, batch) if graph is None else self._replay(graph)

        return self._submit(compute, inputs.num_live_samples, graph, inputs.shape.num_tokens)

    def _replay(self, graph: Hashable) -> StepOutput | None:
        captured, output = self._graphs[graph]
        captured.replay()
        return output

    def _submit(
        self,
        compute: Callable[[], StepOutput | None],
        rows: int,
        graph: Hashable | None,
        num_tokens: int,
    ) -> Launched:
        """Queue a step's computing, and its results' way back: the first `rows` rows of each.

        Where stages divide the layers, hidden states of its `num_tokens` tokens come before and go on after.
        """
        results, candidates = list[Tensor](), list[Tensor]()

        def work() -> None:
            output = compute()
            if output is not None:
                results.extend(self._rows.copy(each, rows) for each in output.of_tokens)
                candidates.extend(self._rows.copy(each, rows) for each in output.candidates or ())

        if self.pipe is not None:
            self.queue.submit(partial(self.pipe.receive, num_tokens))
        stretch = self.queue.stretch()
        self.queue.submit(work)
        stretch.end()
        if self.pipe is not None:
            self.queue.submit(partial(self.pipe.send, num_tokens))
        return Launched(results, candidates, self._rows, stretch, graph)

    @torch.inference_mode()
    def capture(
        self, *, sampled: bool = False, filtered: bool = False, logprobs: bool = False, candidates: int = 0
    ) -> int:
        """Capture a graph for every shape and launch key; returns how many were captured.

        `sampled`, `filtered`, `logprobs` and `candidates` say which kinds of sampling the graphs must serve.
        """
        self.disarm()
        if self.followers is not None:
            self.followers.capture(sampled, filtered, logprobs, candidates)
        before = len(self._graphs)
        for shape in reversed(self._shapes):
            for max_len in self._max_lens:
                inputs = StepInputs(shape)
                inputs.max_len = max_len
                inputs.all_greedy = not sampled
                inputs.any_filter = filtered
                inputs.logprobs = logprobs
                inputs.candidates = candidates
                self._capture_one(inputs)
        return len(self._graphs) - before

    def captured_shape(self, live: StepShape, *, decodes: bool) -> StepShape | None:
        """The smallest captured shape that holds a `live` one; None where there is none.

        decodes: whether what it computes of each sequence is a decode, or verifies one's drafts.
        """
        shapes = [live]
        if live.query and decodes and live.num_tokens <= self.few_drafted:
            shapes.insert(0, StepShape(live.num_tokens))
        return next((shape for each in shapes for shape in self._shapes if shape.holds(each)), None)

    def _captured_shape(self, plan: StepPlan) -> StepShape | None:
        return self.captured_shape(plan.shape, decodes=plan.num_decodes == len(plan.slices))

    def release(self) -> None:
        """Give back the graphs and the caches; nothing can be launched after."""
        self.disarm()
        self._graphs.clear()
        self.caches.clear()

    def _compute(self, buffers: StepBuffers, inputs: StepInputs, batch: Batch) -> StepOutput | None:
        """The step's device work, from uploaded inputs to sampled tokens; safe to capture."""
        ids, positions = buffers.unpack(inputs)
        drafted = inputs.shape.query > 0
        last = self.decoder.spec.last
        entering = None if self.pipe is None else self.pipe.entering(inputs.shape.num_tokens)
        wanted = buffers.wanted(inputs, batch) if inputs.shape.prompts > 0 and not drafted and last else None
        hidden = self.decoder.forward(
            ids, positions, batch, self.caches, wanted, entering=entering, tap=self.decoder.tap
        )
        if self.pipe is not None and not last:
            self.pipe.leave(hidden)
            return None
        if inputs.num_samples == 0:
            return None
        if drafted:
            hidden = hidden[buffers.on_device.logits_indices[: inputs.num_samples]]
        logits = self.decoder.logits(hidden)
        tokens = buffers.keep(inputs, self.sample(logits, buffers.sampling(inputs)))
        output = StepOutput(tokens)
        if inputs.logprobs or inputs.candidates:
            all_logprobs = torch.log_softmax(logits.float(), dim=-1)
        if inputs.logprobs:
            output.logprobs = all_logprobs.gather(1, tokens[:, None])[:, 0]
            output.top_tokens = all_logprobs.argmax(dim=-1)
        if inputs.candidates:
            values, ids = all_logprobs.topk(inputs.candidates)
            output.candidates = (ids, values)
        return output

    def _capture_one(self, inputs: StepInputs) -> None:
        batch = self._batch(inputs)
        key = self._graph_key(inputs)
        if key in self._graphs:
            return
        # Inputs that write nothing anyone reads: every row is padding.
        self._captured.upload(self._captured.fill_inert(inputs.shape))
        # A first eager pass compiles kernels and fills library workspaces, which capture must not see.
        self._compute(self._captured, inputs, batch)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values()))[0].pool() if self._graphs else None
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            output = self._compute(self._captured, inputs, batch)
        assert output is not None or not self.decoder.spec.last
        self._graphs[key] = (graph, output)

    def _batch(self, inputs: StepInputs) -> Batch:
        batch = self._batches.get(inputs.shape)
        if batch is None:
            batch = self._batches[inputs.shape] = self._captured.batch(inputs)
        return replace(batch, max_len=inputs.max_len)

    def _graph_key(self, inputs: StepInputs) -> Hashable:
        """What a captured step's launches bake in; plans are made for the lengths that are captured for."""
        at = (inputs.shape, min(bound for bound in self._max_lens if bound >= inputs.max_len))
        if at not in self._plans:
            self._plans[at] = self.decoder.plan(replace(self._batch(inputs), max_len=at[1]))
        flags = (inputs.all_greedy, inputs.any_filter, inputs.any_forced, inputs.logprobs, inputs.candidates)
        return (inputs.shape, flags, self._plans[at])


def device_seconds() -> float:
    """Wall time in seconds with the device idle on both sides, for warm-up times."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
