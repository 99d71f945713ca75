"""Gates of a CUDA stream, on a driver that only notes what it is told to wait for."""

from __future__ import annotations

import gc
import platform
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from backbench.engine.execution.device_queue import DeviceQueue
from backbench.engine.execution.gate import CudaGates, open_gates

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Notes that the device was waited for."""
    seen: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: seen.append("waited"))
    yield seen
    gc.collect()  # gates that a test leaves wait while that is still so


def words() -> torch.Tensor:
    return torch.zeros(2, dtype=torch.int32)


def passes(opened: int, number: int) -> bool:
    """What the driver compares, by its manual: (int32)(word - number) >= 0."""
    return ((opened - number) & 0xFFFFFFFF) < 2**31


def opened(memory: torch.Tensor) -> int:
    return int(memory[0]) & 0xFFFFFFFF


@pytest.mark.parametrize("before", [0, 2**31 - 2, 2**32 - 2], ids=["first", "sign changes", "wraps around"])
def test_each_gate_waits_for_a_number_of_its_own(before: int) -> None:
    memory, waited = words(), list[int]()
    memory.numpy().view("uint32")[:] = before
    gates = CudaGates(waited.append, memory)
    for _ in range(4):
        gate = gates.gate()
        assert not passes(opened(memory), waited[-1])
        gate.open()
        assert all(passes(opened(memory), number) for number in waited)
    assert len(set(waited)) == 4


def test_one_gate_is_closed_at_a_time() -> None:
    gates = CudaGates(lambda number: None, words())
    gate = gates.gate()
    with pytest.raises(RuntimeError, match="still closed"):
        gates.gate()
    gate.open()
    gates.gate()


def test_a_wait_that_fails_leaves_no_gate() -> None:
    codes = [RuntimeError("no"), None]

    def wait(number: int) -> None:
        if (code := codes.pop(0)) is not None:
            raise code

    gates = CudaGates(wait, words())
    with pytest.raises(RuntimeError, match="no"):
        gates.gate()
    gates.gate()


@pytest.mark.parametrize("closed", [True, False])
def test_dropped_gates_let_the_device_pass_before_their_memory_goes(
    closed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, waited, seen = words(), list[int](), list[bool]()
    gates = CudaGates(waited.append, memory)
    gate = gates.gate()
    if not closed:
        gate.open()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: seen.append(passes(opened(memory), waited[-1])))
    del gates, gate
    gc.collect()
    assert seen == [True]


def test_gates_that_were_never_used_wait_for_nothing(device: list[str]) -> None:
    gates = CudaGates(lambda number: None, words())
    del gates
    gc.collect()
    assert device == []


def test_a_cpu_has_none() -> None:
    queue = DeviceQueue(torch.device("cpu"))
    assert queue.no_gates == "a CPU has done its work when the call returns"
    with pytest.raises(AssertionError, match="a CPU"):
        queue.gate()


class Driver:
    """libcuda, as far as gates know it."""

    def __init__(self, code: int = 0) -> None:
        self.waited: list[tuple[int, ...]] = []

        def wait(*given: int) -> int:
            self.waited.append(given)
            return code

        def pointer(address: Any, host: int, flags: int) -> int:
            address._obj.value = 4096
            return 0

        self.cuStreamWaitValue32_v2 = wait
        self.cuMemHostGetDevicePointer_v2 = pointer


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """torch as it is on a CUDA device, as far as gates ask it."""
    zeros = torch.zeros

    class Stream:
        cuda_stream = 0

    class At:
        def __init__(self, device: torch.device) -> None:
            assert device == CUDA

        def __enter__(self) -> None: ...

        def __exit__(self, *failure: object) -> None: ...

    monkeypatch.setattr(torch, "zeros", lambda *size, pin_memory, dtype: zeros(*size, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "device", At)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.delenv("CUDA_LAUNCH_BLOCKING", raising=False)
    return monkeypatch


def test_the_driver_waits_at_the_devices_address(cuda: pytest.MonkeyPatch) -> None:
    driver = Driver()
    cuda.setattr("ctypes.CDLL", lambda name: driver)
    gates = open_gates(CUDA)
    assert isinstance(gates, CudaGates)
    gates.gate().open()
    gates.gate()
    assert [(given[2], given[3]) for given in driver.waited] == [(0, 0), (1, 0), (2, 0)], "a trial first"


def test_what_has_no_gates_says_why(cuda: pytest.MonkeyPatch) -> None:
    cuda.setattr("ctypes.CDLL", lambda name: Driver(801))
    assert open_gates(CUDA) == "the driver does not wait for host memory (CUresult 801)"
    cuda.setattr("ctypes.CDLL", lambda name: object())
    assert "no cuStreamWaitValue32_v2" in str(open_gates(CUDA))
    cuda.setattr(platform, "machine", lambda: "aarch64")
    assert "aarch64" in str(open_gates(CUDA))
    cuda.setenv("CUDA_LAUNCH_BLOCKING", "1")
    assert "CUDA_LAUNCH_BLOCKING" in str(open_gates(CUDA))
    cuda.setattr(torch.version, "hip", "7.2")
    assert "HIP" in str(open_gates(CUDA))
