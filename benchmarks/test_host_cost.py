"""What a decode step costs the host: scheduling, filling the step buffers, landing the tokens.

    pytest benchmarks/test_host_cost.py

The budget is 1 ms of scheduling and preparation for 256 running requests, and linear growth to 4,096. The
device does nothing here, so the figures hold for any backend.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from backbench.engine.config import EngineConfig
from backbench.engine.execution.device_queue import DeviceQueue
from backbench.engine.execution.step_buffers import RequestTables, StepBuffers
from backbench.engine.limits import EngineLimits
from backbench.engine.request import SamplingParams
from backbench.engine.scheduling.blocks import BlockPool
from backbench.engine.scheduling.scheduler import Scheduler, StepPlan
from backbench.engine.scheduling.sequence import Sequence

BLOCK_SIZE = 16
MAX_BLOCKS = 64


class Steps:
    """A scheduler with `count` running decodes, and the buffers their steps are prepared in."""

    def __init__(self, count: int) -> None:
        budget = EngineConfig().max_step_tokens
        limits = EngineLimits(
            block_size=BLOCK_SIZE,
            max_len=MAX_BLOCKS * BLOCK_SIZE,
            max_seqs=count,
            max_step_tokens=budget,
            prefill_chunk=budget,
            num_blocks=count * MAX_BLOCKS,
        )
        device = torch.device("cpu")
        self.scheduler = Scheduler(BlockPool(limits.num_blocks, BLOCK_SIZE), limits)
        self.buffers = StepBuffers(limits, RequestTables(limits, device), device, DeviceQueue(device))
        params = SamplingParams(max_tokens=MAX_BLOCKS * BLOCK_SIZE - 32)
        for order in range(count):
            self.scheduler.add(Sequence(str(order), 0, list(range(32)), params, order))
        while (plan := self.prepare()).num_decodes < count:
            self.land(plan)
        self.land(plan)

    def prepare(self) -> StepPlan:
        plan = self.scheduler.schedule()
        self.buffers.fill(plan)
        return plan

    def land(self, plan: StepPlan) -> None:
        for part in plan.slices:
            self.scheduler.land(part, 5 if part.samples else None)


@pytest.fixture(params=[256, 1024, 4096])
def steps(request: pytest.FixtureRequest) -> Iterator[Steps]:
    made = Steps(request.param)
    # As a replay does: what lives for the whole run is not walked by the collector at every step.
    gc.collect()
    gc.freeze()
    yield made
    gc.unfreeze()


def test_schedule_and_prepare(benchmark: BenchmarkFixture, steps: Steps) -> None:
    planned: list[StepPlan] = []

    def land_last() -> None:
        if planned:
            steps.land(planned.pop())

    benchmark.pedantic(lambda: planned.append(steps.prepare()), setup=land_last, rounds=60)


def test_land(benchmark: BenchmarkFixture, steps: Steps) -> None:
    benchmark.pedantic(steps.land, setup=lambda: ((steps.prepare(),), {}), rounds=60)
