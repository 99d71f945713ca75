"""A gate in a device's queue: the device waits there, with all that is queued behind, until the host opens.

On CUDA the driver waits (`cuStreamWaitValue32`) until a word of pinned host memory has reached a number, so
opening a gate is one store and no call. torch has no such operation: the driver is called through ctypes.
Where a device has no gates, `open_gates` says why.
"""

from __future__ import annotations

import ctypes
import os
import platform
import weakref
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

WAIT_GEQ = 0
"""CU_STREAM_WAIT_VALUE_GEQ: until (int32)(word - number) >= 0, so that numbers may wrap around."""
ORDERED_STORES = ("x86_64", "AMD64")
"""Hosts whose stores another device sees in the order they were made in: inputs before the word."""


class Gate(Protocol):
    """A place in the queue that the device does not pass while it is closed."""

    def open(self) -> None:
        """Let the device pass. What the host wrote before is there for the work behind the gate."""


class CudaGates:
    """Gates of the current stream of a CUDA device, one closed at a time."""

    def __init__(self, wait: Callable[[int], None], words: Tensor) -> None:
        """wait(number) has the stream wait until words[0] reaches the number. words: i32[2] of zeros, pinned;
        the second keeps the number of the gate made last."""
        self._wait = wait
        self._words = words.numpy().view(np.uint32)
        # Nothing may wait for memory that is given back: an engine may be dropped with a gate closed.
        weakref.finalize(self, _pass_all, words)

    def gate(self) -> Gate:
        """A closed gate behind all that was queued so far."""
        opened, made = map(int, self._words)
        if opened != made:
            raise RuntimeError("The gate before is still closed.")
        number = (made + 1) % 2**32
        self._words[1] = number
        try:
            self._wait(number)
        except BaseException:
            self._words[0] = number
            raise
        return _NumberedGate(self._words, number)


class _NumberedGate:
    def __init__(self, words: np.ndarray, number: int) -> None:
        self._words = words
        self._number = number

    def open(self) -> None:
        self._words[0] = self._number


def _pass_all(words: Tensor) -> None:
    opened_made = words.numpy()
    if opened_made.any():
        opened_made[0] = opened_made[1]
        torch.cuda.synchronize()


def open_gates(device: torch.device) -> CudaGates | str:
    """The gates of a device; or why there are none."""
    if device.type == "cpu":
        return "a CPU has done its work when the call returns"
    if torch.version.hip is not None:
        return "HIP waits for memory of its own kind alone (hipMallocSignalMemory)"
    if os.environ.get("CUDA_LAUNCH_BLOCKING", "0") != "0":
        return "with CUDA_LAUNCH_BLOCKING every launch waits for the device"
    if platform.machine() not in ORDERED_STORES:
        return f"on {platform.machine()} a device may see the host's stores in another order"
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        stream_wait, device_pointer = driver.cuStreamWaitValue32_v2, driver.cuMemHostGetDevicePointer_v2
    except (OSError, AttributeError):
        return "the driver has no cuStreamWaitValue32_v2"
    stream_wait.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint]
    device_pointer.argtypes = [ctypes.POINTER(ctypes.c_uint64), ctypes.c_void_p, ctypes.c_uint]
    words = torch.zeros(2, dtype=torch.int32, pin_memory=True)
    address = ctypes.c_uint64()
    code = device_pointer(ctypes.byref(address), words.data_ptr(), 0)

    def wait_code(number: int) -> int:
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream().cuda_stream
            found: int = stream_wait(stream, address, number, WAIT_GEQ)
            return found

    code = code or wait_code(0)  # is passed at once: a trial
    if code:
        return f"the driver does not wait for host memory (CUresult {code})"

    def wait(number: int) -> None:
        if code := wait_code(number):
            raise RuntimeError(f"cuStreamWaitValue32 failed (CUresult {code}).")

    return CudaGates(wait, words)
