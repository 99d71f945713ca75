"""A runner for gates that runs nothing: it writes run directories with numbers as they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from record_fixtures import CPU, NVIDIA, make_record, simulate, telemetry

from backbench.harness.gate.arms import BASELINE, CANDIDATE, Arm
from backbench.harness.gate.policy import Policy
from backbench.harness.gate.session import Session
from backbench.reports.record import RunDirectory, RunRecord, sign

Change = Callable[[RunRecord, str, int], RunRecord | None]

REQUESTS, STEPS = simulate(CPU, 1, 6, 6.0)
TELEMETRY = telemetry(CPU, STEPS, 1)
RECORD = make_record(CPU, "torch", REQUESTS, STEPS, 1)


def changed(record: RunRecord, path: str, value: Any) -> RunRecord:
    """The record with another value at "section.key.key"."""
    section, *keys = path.split(".")
    content = deepcopy(getattr(record, section))
    if not keys:
        return replace(record, **{section: value})
    inner = content
    for key in keys[:-1]:
        inner = inner.setdefault(key, {})
    inner[keys[-1]] = value
    return replace(record, **{section: content})


@dataclass
class FakeRunner:
    """A runner whose candidate is `loss` slower, with `noise` a run; keeps what it was asked to run."""

    loss: float = 0.0
    noise: float = 0.005
    change: Change = lambda record, arm, seed: record
    """What else is different in a run; by record, arm and seed."""
    clock_mhz: Callable[[str, int], float] | None = None
    runs: list[tuple[str, int]] = field(default_factory=list)

    def __call__(self, arm: Arm, policy: Policy, seed: int, out: Path) -> RunDirectory:
        self.runs.append((arm.name, seed))
        rng = np.random.default_rng([seed, arm.name == CANDIDATE])
        slower = float(np.exp(rng.normal(0, self.noise))) * (1 + self.loss * (arm.name == CANDIDATE))
        record = changed(RECORD, "metrics.output_tokens_per_s.whole_run", 500 / slower)
        record = changed(record, "metrics.tpot_s.p50.value", 0.02 * slower)
        record = changed(record, "metrics.ttft_s.p50.value", 0.1 * slower)
        record = changed(record, "workload.content_hash", f"{seed:064d}")
        record = changed(record, "workload.parameters.seed", seed)
        wanted = self.change(record, arm.name, seed)
        assert wanted is not None
        directory = RunDirectory.create(out)
        directory.write_requests(REQUESTS)
        directory.write_steps(STEPS)
        table = TELEMETRY
        if self.clock_mhz is not None:
            table = telemetry(NVIDIA, STEPS, 1).assign(sm_clock_mhz=self.clock_mhz(arm.name, seed))
        directory.write_telemetry(table)
        directory.write_record(sign(directory, wanted))
        return directory


@pytest.fixture
def gate(tmp_path: Path) -> Callable[..., Session]:
    """A session in `tmp_path` with a runner and settings of its own."""

    def make(runner: Any, **settings: Any) -> Session:
        policy = settings.pop("policy", Policy())
        told: list[str] = []
        arms = Arm(BASELINE), Arm(CANDIDATE, ("--backend", "sdpa"))
        return Session(policy, *arms, tmp_path / "gate", runner, told.append, **settings)

    return make
