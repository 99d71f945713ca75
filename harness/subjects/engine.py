"""The reference engine as a replay's target, in the same thread."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from backbench.harness.subjects.target import TokenEvent
from backbench.reports.metrics.roofline import ModelShape
from backbench.workloads.request import Request

if TYPE_CHECKING:
    import torch

    from backbench.engine.engine import Engine
    from backbench.engine.models.config import ModelConfig
    from backbench.engine.models.weights import Weights
    from backbench.engine.request import StepStats


def model_shape(config: ModelConfig, dtype: torch.dtype, weights: Weights) -> ModelShape:
    """The shape of a model that runs on `weights` in `dtype`, with a KV cache in the same."""
    head = config.spec.head.parameters
    return ModelShape(
        windows=list(config.windows),
        q_heads=config.q_heads,
        head_dim=config.head_dim,
        linear_parameters=config.linear_parameters - head,
        head_parameters=head,
        weight_bytes_per_step=weights.streamed_bytes,
        kv_bytes_per_token=config.kv_bytes_per_token(dtype),
    )


LONGEST_SLEEP_S = 0.05
"""An idle poll returns at least this often, so that Ctrl-C is answered."""


class EngineTarget:
    """`submit` queues a request in the engine; `poll` runs one step and stamps its tokens."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.steps: list[StepStats] = []
        """Statistics of every step so far."""
        self._in_flight: set[int] = set()

    @property
    def running(self) -> int:
        return self.steps[-1].running if self.steps else 0

    @property
    def waiting(self) -> int:
        return self.steps[-1].waiting if self.steps else 0

    def submit(self, request: Request) -> int:
        """Queue the request. Raises EngineError where it can never be served."""
        from backbench.engine.request import SamplingParams

        params = SamplingParams(
            max_tokens=request.output_tokens,
            temperature=request.temperature,
            seed=request.seed,
            ignore_eos=True,
        )
        self.engine.add_request(str(request.id), request.prompt, params)
        self._in_flight.add(request.id)
        return time.perf_counter_ns()

    def poll(self, deadline_ns: int | None) -> list[TokenEvent]:
        """One engine step; without work, sleep until the deadline (at most 50 ms)."""
        if not self.engine.has_work:
            if deadline_ns is not None:
                time.sleep(min(max(0.0, (deadline_ns - time.perf_counter_ns()) / 1e9), LONGEST_SLEEP_S))
            return []
        tokens = self.engine.step()
        now_ns = time.perf_counter_ns()
        self.steps.extend(self.engine.take_step_stats())
        ids: dict[int, list[int]] = {}
        ended: set[int] = set()
        for token in tokens:
            request_id = int(token.request_id)
            ids.setdefault(request_id, []).append(token.token_id)
            if token.finish_reason is not None:
                ended.add(request_id)
        self._in_flight -= ended
        return [
            TokenEvent(request_id, now_ns, len(seen), tuple(seen), request_id in ended)
            for request_id, seen in ids.items()
        ]

    def abort(self) -> None:
        """Drop everything in flight and what the engine still had to say about it."""
        for request_id in self._in_flight:
            self.engine.abort(str(request_id))
        self._in_flight.clear()
        while self.engine.has_work:
            self.engine.step()
        self.steps.extend(self.engine.take_step_stats())
