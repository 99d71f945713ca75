"""The peaks times are held against: measured on every device, CPUs too."""

from __future__ import annotations

import torch

from backends.interface import Device
from harness.kernels.timing import time_eager
from harness.roofline import Peaks, measure_peaks

CPU_COPY_BYTES = 128 * 2**20
CPU_MATRIX = 1024


def device_peaks(device: Device, dtype: torch.dtype) -> Peaks:
    """A large copy and a large matrix product, with the datasheet's figures where the device is known."""
    if device.torch_device.type != "cpu":
        return measure_peaks(device, dtype)
    source = torch.zeros(CPU_COPY_BYTES, dtype=torch.uint8)
    copy = torch.empty_like(source)
    a, b = (torch.randn(CPU_MATRIX, CPU_MATRIX).to(dtype) for _ in range(2))
    copied = time_eager([lambda: copy.copy_(source)], device, 0.3)
    multiplied = time_eager([lambda: torch.matmul(a, b)], device, 0.3)
    # The fastest round: a peak is what the machine can do, not what its neighbours left.
    return Peaks(2 * CPU_COPY_BYTES / copied.low_s, 2 * CPU_MATRIX**3 / multiplied.low_s)
