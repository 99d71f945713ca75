"""Runs steps on the device: inputs in, one forward pass, sampled tokens on their way back.

Nothing here waits for the device except `StepInFlight.read`. Decodes, and steps with few prompt tokens,
replay a captured graph where the backend allows it; a graph is keyed by every host integer its launches
bake in.
"""

from __future__ import annotations

import time
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backbench.backends.interface import Batch, GraphSupport, Operations
from backbench.engine.execution.step_buffers import StepBuffers, StepInputs
from backbench.engine.execution.step_shape import StepShape, graph_shapes, max_len_ladder
from backbench.engine.models.decoder import Decoder
from backbench.engine.scheduling.scheduler import StepPlan
from backbench.errors import EngineError


@dataclass
class StepOutput:
    """What a step leaves on the device: tokens i64[S], perhaps log-probabilities f32[S] and top i64[S]."""

    tokens: Tensor
    logprobs: Tensor | None = None
    top_tokens: Tensor | None = None


class StepInFlight:
    """A launched step whose results may not be there yet."""

    def __init__(self, plan: StepPlan, inputs: StepInputs, output: StepOutput | None, graph: bool) -> None:
        self.plan = plan
        self.inputs = inputs
        self.graph = graph
        self._event: torch.cuda.Event | None = None
        self._results: list[Tensor] = []
        if output is None:
            return
        live = sum(part.samples for part in plan.slices)
        results = [output.tokens, output.logprobs, output.top_tokens]
        for result in results:
            if result is None:
                break
            if result.is_cuda:
                host = torch.empty(live, dtype=result.dtype, pin_memory=True)
                host.copy_(result[:live], non_blocking=True)
            else:
                host = result[:live]
            self._results.append(host)
        if output.tokens.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> tuple[list[int], list[float] | None, list[int] | None]:
        """Wait for the step; (tokens, log-probabilities, top tokens) of the slices that sampled, in order."""
        if self._event is not None:
            self._event.synchronize()
        if not self._results:
            return [], None, None
        lists: list[Any] = [result.tolist() for result in self._results]
        return (lists[0], lists[1], lists[2]) if len(lists) == 3 else (lists[0], None, None)


class Runner:
    """Owns the device's request tables, the KV caches, the step buffers and the captured graphs."""

    def __init__(
        self,
        decoder: Decoder,
        operations: Operations,
        *,
        num_blocks: int,
        block_size: int,
        num_rows: int,
        max_seqs: int,
        max_step_tokens: int,
        max_batch_tokens: int,
        max_len: int,
        device: torch.device,
        graphs: bool,
    ) -> None:
        self.decoder = decoder
        self.operations = operations
        self.device = device
        self.max_len = max_len
        max_blocks = -(-max_len // block_size)
        try:
            self.caches = decoder.new_caches(num_blocks)
        except torch.cuda.OutOfMemoryError:
            gib = num_blocks * decoder.cache_bytes_per_block() / 2**30
            raise EngineError(
                f"A pool of {num_blocks} KV blocks, {gib:.1f} GiB, does not fit beside the weights; "
                "lower --num-blocks or --kv-memory-fraction."
            ) from None
        self._host_table = np.zeros((num_rows + 1, max_blocks), dtype=np.int32)
        self._table = torch.zeros(num_rows + 1, max_blocks, dtype=torch.int32, device=device)
        self._last_tokens = torch.zeros(num_rows + 1, dtype=torch.int64, device=device)
        rest = (self._host_table, block_size, device)
        self._eager = StepBuffers(max_batch_tokens, max_seqs, *rest)
        self.graphs_enabled = (
            graphs and device.type == "cuda" and decoder.graph_support >= GraphSupport.DECODE
        )
        self._shapes: list[StepShape] = []
        if self.graphs_enabled:
            mixed = decoder.graph_support >= GraphSupport.MIXED
            self._shapes = graph_shapes(max_seqs, max_step_tokens, mixed)
        largest = max((shape.num_tokens for shape in self._shapes), default=1)
        self._captured = StepBuffers(largest, max_seqs, *rest)
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, StepOutput]] = {}
        self._batches: dict[StepShape, Batch] = {}
        self.graph_misses = 0
        """Steps of a shape that is captured which found no graph of their kind and ran eagerly."""

    @property
    def num_graphs(self) -> int:
        """Graphs captured so far."""
        return len(self._graphs)

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> StepInFlight:
        """Start a step; returns at once on a GPU."""
        if plan.copies:
            source, target = torch.tensor(plan.copies, device=self.device).T
            self.decoder.copy_blocks(self.caches, source, target)
        live = plan.shape
        shape = next((shape for shape in self._shapes if shape.holds(live)), None)
        if shape is not None:
            return self._launch_graph(plan, shape)
        self._update_tables(plan, self._eager)
        inputs = self._eager.fill(plan)
        self._eager.upload()
        output = self._compute(self._eager, inputs, self._eager.batch(inputs))
        return StepInFlight(plan, inputs, output, graph=False)

    @torch.inference_mode()
    def capture(self, *, sampled: bool = False, filtered: bool = False, logprobs: bool = False) -> int:
        """Capture a graph for every shape and launch key; returns how many were captured.

        `sampled`, `filtered` and `logprobs` say which kinds of sampling the graphs must serve.
        """
        before = len(self._graphs)
        for shape in reversed(self._shapes):
            for max_len in max_len_ladder(self.max_len):
                inputs = StepInputs(shape)
                inputs.max_len = max_len
                inputs.all_greedy = not sampled
                inputs.any_filter = filtered
                inputs.logprobs = logprobs
                self._capture_one(inputs)
        return len(self._graphs) - before

    def _launch_graph(self, plan: StepPlan, shape: StepShape) -> StepInFlight:
        self._update_tables(plan, self._captured)
        inputs = self._captured.fill(plan, shape)
        self._captured.upload()
        batch = self._batch(inputs)
        captured = self._graphs.get(self._graph_key(inputs, batch))
        if captured is None:
            self.graph_misses += 1
            return StepInFlight(plan, inputs, self._compute(self._captured, inputs, batch), graph=False)
        captured[0].replay()
        return StepInFlight(plan, inputs, captured[1], graph=True)

    def _compute(self, buffers: StepBuffers, inputs: StepInputs, batch: Batch) -> StepOutput | None:
        """The step's device work, from uploaded inputs to sampled tokens; safe to capture."""
        ids, positions = buffers.unpack(inputs, self._table, self._last_tokens)
        count = inputs.num_samples
        wanted = buffers.wanted(inputs, batch) if inputs.shape.prompts > 0 else None
        hidden = self.decoder.forward(ids, positions, batch, self.caches, wanted)
        if count == 0:
            return None
        logits = self.decoder.logits(hidden)
        tokens = self.operations.sample(logits, buffers.sampling(inputs))
        if inputs.any_forced:
            forced = buffers.on_device["forced"][:count]
            tokens = torch.where(forced >= 0, forced, tokens)
        self._last_tokens.index_put_((buffers.on_device["sample_rows"][:count],), tokens)
        if not inputs.logprobs:
            return StepOutput(tokens)
        all_logprobs = torch.log_softmax(logits.float(), dim=-1)
        chosen = all_logprobs.gather(1, tokens[:, None])[:, 0]
        return StepOutput(tokens, chosen, all_logprobs.argmax(dim=-1))

    def _capture_one(self, inputs: StepInputs) -> None:
        batch = self._batch(inputs)
        key = self._graph_key(inputs, batch)
        if key in self._graphs:
            return
        # Inputs that write nothing anyone reads: every row is padding.
        self._captured.fill_inert(inputs.shape)
        self._captured.upload()
        # A first eager pass compiles kernels and fills library workspaces, which capture must not see.
        self._compute(self._captured, inputs, batch)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values()))[0].pool() if self._graphs else None
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            output = self._compute(self._captured, inputs, batch)
        assert output is not None
        self._graphs[key] = (graph, output)

    def _batch(self, inputs: StepInputs) -> Batch:
        batch = self._batches.get(inputs.shape)
        if batch is None:
            batch = self._batches[inputs.shape] = self._captured.batch(inputs)
        batch.max_len = inputs.max_len
        return batch

    def _graph_key(self, inputs: StepInputs, batch: Batch) -> Hashable:
        flags = (inputs.all_greedy, inputs.any_filter, inputs.any_forced, inputs.logprobs)
        return (inputs.shape, flags, self.decoder.plan(batch))

    def _update_tables(self, plan: StepPlan, buffers: StepBuffers) -> None:
        """Bring the host's block table up to date; the device's follows with the step's inputs.

        Where prefix hits changed more entries than those hold, the device's is updated here.
        """
        if not plan.table_updates:
            return
        rows, columns = np.asarray(list(plan.table_updates)).T
        blocks = np.asarray(list(plan.table_updates.values()), dtype=np.int32)
        self._host_table[rows, columns] = blocks
        if len(blocks) > buffers.max_updates:
            entries = (torch.tensor(rows, device=self.device), torch.tensor(columns, device=self.device))
            self._table.index_put_(entries, torch.tensor(blocks, device=self.device))
            plan.table_updates = {}


def device_seconds() -> float:
    """Wall time in seconds with the device idle on both sides, for warm-up times."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
