"""Results on the host: rows copied to memory that is used again once it was read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from backbench.engine.execution.device_queue import DeviceQueue
from backbench.engine.execution.results import HostRows, Launched, StepInFlight, StepOutput
from backbench.engine.execution.step_buffers import StepInputs
from backbench.engine.execution.step_shape import StepShape
from backbench.engine.scheduling.scheduler import StepPlan


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from([(), (3,)]), st.booleans()), max_size=12))
def test_rows_are_those_of_the_result_whatever_came_before(asked: list[tuple[int, Any, bool]]) -> None:
    rows = HostRows(pinned=False)
    held: list[tuple[torch.Tensor, torch.Tensor, int]] = []
    for i, (count, shape, give_back) in enumerate(asked):
        result = torch.full((9, *shape), i) + torch.arange(9).view(9, *[1] * len(shape)) * 100
        held.append((rows.copy(result, count), result, count))
        for host, expected, live in held:
            assert torch.equal(host[:live], expected[:live])
        if give_back:
            rows.give_back([held.pop(0)[0]])


def test_memory_is_used_again_once_it_is_given_back() -> None:
    rows, result = HostRows(pinned=False), torch.arange(8)
    first, second = rows.copy(result, 5), rows.copy(result, 6)
    assert first.data_ptr() != second.data_ptr()
    rows.give_back([first])
    assert rows.copy(result, 8).data_ptr() == first.data_ptr(), "up to eight rows share a size"
    assert rows.copy(result.float(), 5).dtype == torch.float32


def test_what_is_reserved_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, result = HostRows(pinned=False), torch.arange(8)
    rows.reserve([result, result.float(), result], 5)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: pytest.fail("allocated behind a gate"))
    kept = [rows.copy(each, 5)[:5].tolist() for each in (result, result.float(), result + 1)]
    assert kept == [[0, 1, 2, 3, 4], [0.0, 1.0, 2.0, 3.0, 4.0], [1, 2, 3, 4, 5]]


def test_a_step_is_read_up_to_its_live_samples_and_gives_its_memory_back() -> None:
    rows = HostRows(pinned=False)
    output = StepOutput(torch.arange(4), torch.zeros(4), torch.ones(4, dtype=torch.int64))
    inputs = StepInputs(StepShape(4))
    inputs.num_live_samples = 3
    stretch = DeviceQueue(torch.device("cpu")).stretch()
    results = [rows.copy(each, 4) for each in output.of_tokens]
    step = StepInFlight(StepPlan(), inputs, Launched(results, [], rows, stretch, graph=("key",)), armed_ns=5)
    assert step.read() == ([0, 1, 2], [0.0, 0.0, 0.0], [1, 1, 1])
    assert (step.graph, step.armed_ns) == (("key",), 5)
    assert rows.copy(output.tokens, 4).data_ptr() in {result.data_ptr() for result in results}
    nothing = Launched([], [], rows, stretch, graph=None)
    assert StepInFlight(StepPlan(), inputs, nothing).read() == ([], None, None)
