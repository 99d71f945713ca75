"""Runs steps on the device: inputs in, one forward pass, sampled tokens on their way back.

Nothing here waits for the device except `StepInFlight.read`. Decodes, and steps with few prompt tokens,
replay a captured graph where the backend allows it; a graph is keyed by every host integer its launches
bake in.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from backbench.backends.interface import Batch, Operations, SamplingBatch
from backbench.engine.execution.device_queue import DeviceQueue, Stretch
from backbench.engine.execution.step_buffers import RequestTables, Staging, StepBuffers, StepInputs
from backbench.engine.execution.step_shape import FEW_DRAFTED, StepShape, max_len_ladder
from backbench.engine.limits import EngineLimits
from backbench.engine.models.decoder import Decoder
from backbench.engine.parallel.pipe import Pipe
from backbench.engine.scheduling.scheduler import StepPlan
from backbench.errors import EngineError


@dataclass
class StepOutput:
    """What a step leaves on the device: tokens i64[S], and on demand their log-probabilities f32[S], the most
    likely tokens i64[S], and candidates."""

    tokens: Tensor
    logprobs: Tensor | None = None
    top_tokens: Tensor | None = None
    candidates: tuple[Tensor, Tensor] | None = None
    """The most likely tokens i64[S, k] and their log-probabilities f32[S, k]."""


@dataclass(frozen=True)
class Launched:
    """What the device was given to do, and where on the host its results will be."""

    results: list[Tensor]
    candidates: list[Tensor]
    """Both are there when `work` is done, and empty where the step samples nothing."""
    work: Stretch
    graph: bool
    """Whether a captured graph was replayed."""


class StepInFlight:
    """A launched step whose results may not be there yet."""

    def __init__(self, plan: StepPlan, inputs: StepInputs, launched: Launched) -> None:
        self.plan = plan
        self.inputs = inputs
        self.graph = launched.graph
        self._results = launched.results
        self._candidates = launched.candidates
        self._work = launched.work
        self.device_ns: int | None = None
        """How long the device took, once `read` has waited for it; None on a CPU."""

    def read(self) -> tuple[list[int], list[float] | None, list[int] | None]:
        """Wait for the step; (tokens, log-probabilities, top tokens) of the slices that sampled, in order."""
        self._work.synchronize()
        self.device_ns = self._work.device_ns()
        if not self._results:
            return [], None, None
        lists: list[Any] = [result.tolist() for result in self._results]
        return (lists[0], lists[1], lists[2]) if len(lists) == 3 else (lists[0], None, None)

    def candidates(self, sample: int, count: int) -> list[tuple[int, float]]:
        """After `read`: a slice's `count` most likely tokens, and their log-probabilities."""
        ids, logprobs = (each[sample, :count].tolist() for each in self._candidates)
        return list(zip(ids, logprobs, strict=True))


class Followers(Protocol):
    """Other ranks, whose runners do what this one does, at the same time and in the same order."""

    def step(self, filled: Staging, inputs: StepInputs, captured: bool) -> None:
        """Have them `Runner.follow` a step of these inputs."""

    def capture(self, sampled: bool, filtered: bool, logprobs: bool, candidates: int) -> None:
        """Have them `Runner.capture`."""


class Runner:
    """Owns the device's request tables, the KV caches, the step buffers and the captured graphs."""

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
        tables = RequestTables(limits, device)
        largest = max((shape.num_tokens for shape in self._shapes), default=1)
        # With as many no step in flight has to end before the next is filled.
        stagings = 2 if pipe is None else max(2, pipe.num_stages - 1)
        self._eager = StepBuffers(limits, tables, device, self.queue, num_stagings=stagings)
        self._captured = StepBuffers(limits, tables, device, self.queue, largest, stagings)
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, StepOutput | None]] = {}
        self._batches: dict[StepShape, Batch] = {}
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

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> StepInFlight:
        """Start a step; returns at once on a GPU."""
        shape = self._captured_shape(plan)
        buffers = self._eager if shape is None else self._captured
        inputs = buffers.fill(plan, shape)
        if self.followers is not None:
            self.followers.step(buffers.filled, inputs, shape is not None)
        return StepInFlight(plan, inputs, self._start(buffers, inputs))

    @torch.inference_mode()
    def follow(self, integers: np.ndarray, floats: np.ndarray, inputs: StepInputs, captured: bool) -> None:
        """Start a step as another rank has filled it; returns at once on a GPU."""
        buffers = self._captured if captured else self._eager
        buffers.take(integers, floats)
        self._start(buffers, inputs)

    def _start(self, buffers: StepBuffers, inputs: StepInputs) -> Launched:
        """Upload what was filled last and launch."""
        buffers.upload(inputs)
        captured = None
        if buffers is self._eager:
            batch = buffers.batch(inputs)
        else:
            batch = self._batch(inputs)
            captured = self._graphs.get(self._graph_key(inputs, batch))
            self.graph_misses += captured is None
        results: list[Tensor] = []
        candidates: list[Tensor] = []

        def compute() -> None:
            if inputs.num_copies:
                self.decoder.copy_blocks(self.caches, *buffers.copies(inputs))
            if captured is None:
                output = self._compute(buffers, inputs, batch)
            else:
                captured[0].replay()
                output = captured[1]
            if output is not None:
                live = inputs.num_live_samples
                results.extend(_start_reading((output.tokens, output.logprobs, output.top_tokens), live))
                candidates.extend(_start_reading(output.candidates or (), live))

        if self.pipe is not None:
            self.queue.submit(partial(self.pipe.receive, inputs.shape.num_tokens))
        work = self.queue.stretch()
        self.queue.submit(compute)
        work.end()
        if self.pipe is not None:
            self.queue.submit(partial(self.pipe.send, inputs.shape.num_tokens))
        return Launched(results, candidates, work, graph=captured is not None)

    @torch.inference_mode()
    def capture(
        self, *, sampled: bool = False, filtered: bool = False, logprobs: bool = False, candidates: int = 0
    ) -> int:
        """Capture a graph for every shape and launch key; returns how many were captured.

        `sampled`, `filtered`, `logprobs` and `candidates` say which kinds of sampling the graphs must serve.
        """
        if self.followers is not None:
            self.followers.capture(sampled, filtered, logprobs, candidates)
        before = len(self._graphs)
        for shape in reversed(self._shapes):
            for max_len in max_len_ladder(self.limits.max_len):
                inputs = StepInputs(shape)
                inputs.max_len = max_len
                inputs.all_greedy = not sampled
                inputs.any_filter = filtered
                inputs.logprobs = logprobs
                inputs.candidates = candidates
                self._capture_one(inputs)
        return len(self._graphs) - before

    def _captured_shape(self, plan: StepPlan) -> StepShape | None:
        """The smallest captured shape that holds the step; None where there is none."""
        live = [plan.shape]
        if plan.num_drafted and plan.num_tokens <= FEW_DRAFTED and plan.num_decodes == len(plan.slices):
            live.insert(0, StepShape(plan.num_tokens))
        return next((shape for each in live for shape in self._shapes if shape.holds(each)), None)

    def release(self) -> None:
        """Give back the graphs and the caches; nothing can be launched after."""
        self._graphs.clear()
        self.caches.clear()

    def _compute(self, buffers: StepBuffers, inputs: StepInputs, batch: Batch) -> StepOutput | None:
        """The step's device work, from uploaded inputs to sampled tokens; safe to capture."""
        ids, positions = buffers.unpack(inputs)
        drafted = inputs.shape.query > 0
        last = self.decoder.spec.last
        entering = None if self.pipe is None else self.pipe.entering(inputs.shape.num_tokens)
        wanted = buffers.wanted(inputs, batch) if inputs.shape.prompts > 0 and not drafted and last else None
        hidden = self.decoder.forward(ids, positions, batch, self.caches, wanted, entering)
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
        key = self._graph_key(inputs, batch)
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

    def _graph_key(self, inputs: StepInputs, batch: Batch) -> Hashable:
        flags = (inputs.all_greedy, inputs.any_filter, inputs.any_forced, inputs.logprobs, inputs.candidates)
        return (inputs.shape, flags, self.decoder.plan(batch))


def _start_reading(results: Iterable[Tensor | None], live: int) -> list[Tensor]:
    """The first `live` rows of each result up to the first None, on their way to the host."""
    hosts = []
    for result in results:
        if result is None:
            break
        if result.is_cuda:
            host = torch.empty((live, *result.shape[1:]), dtype=result.dtype, pin_memory=True)
            host.copy_(result[:live], non_blocking=True)
        else:
            host = result[:live]
        hosts.append(host)
    return hosts


def device_seconds() -> float:
    """Wall time in seconds with the device idle on both sides, for warm-up times."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
