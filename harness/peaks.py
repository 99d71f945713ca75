"""The peaks times are held against: what the data sheet says and what this device was measured to do."""

from __future__ import annotations

from collections.abc import Callable

import torch

from backbench.backends.interface import Device
from backbench.harness.kernels.timing import time_eager
from backbench.reports.metrics.roofline import Peaks

CPU_COPY_BYTES = 128 * 2**20
CPU_MATRIX = 1024
_DATASHEET: dict[str, tuple[float, float]] = {
    # Name the driver reports (a part of it, longest match wins): bytes/s, dense 16-bit FLOP/s.
    # Sources: the vendors' data sheets.
    "B200": (8.0e12, 2.25e15),
    "H200": (4.8e12, 0.989e15),
    "H100 PCIe": (2.0e12, 0.756e15),
    "H100 NVL": (3.9e12, 0.835e15),
    "H100": (3.35e12, 0.989e15),
    "A100-SXM4-80GB": (2.039e12, 0.312e15),
    "A100 80GB PCIe": (1.935e12, 0.312e15),
    "A100": (1.555e12, 0.312e15),
    "L40S": (0.864e12, 0.362e15),
    "L4": (0.300e12, 0.121e15),
    "MI250X": (3.2e12, 0.383e15),
    "MI300X": (5.3e12, 1.307e15),
    "MI325X": (6.0e12, 1.307e15),
    "MI355X": (8.0e12, 2.5e15),
}


def datasheet(device_name: str) -> tuple[float, float] | None:
    """(bytes/s, dense 16-bit FLOP/s) of a known accelerator, else None."""
    matches = [name for name in _DATASHEET if name.lower() in device_name.lower()]
    return _DATASHEET[max(matches, key=len)] if matches else None


def measure_peaks(device: Device, dtype: torch.dtype) -> Peaks:
    """Datasheet peaks by name, and on a GPU the measured ones: a 1 GiB copy and an 8192^3 matmul."""
    sheet = datasheet(device.name)
    narrow = dtype in (torch.bfloat16, torch.float16)
    sheet_bytes = sheet[0] if sheet else None
    sheet_flops = sheet[1] if sheet and narrow else None
    if device.torch_device.type == "cpu":
        return Peaks(note="peaks are measured on accelerators only")
    peaks = Peaks(
        _copy_bytes_per_s(device.torch_device),
        _matmul_flops_per_s(device.torch_device, dtype),
        sheet_bytes,
        sheet_flops,
    )
    torch.cuda.empty_cache()
    return peaks


def _copy_bytes_per_s(where: torch.device, size: int = 2**30) -> float:
    source = torch.zeros(size, dtype=torch.uint8, device=where)
    copy = torch.empty_like(source)
    return 2 * size / _median_seconds(lambda: copy.copy_(source))


def _matmul_flops_per_s(where: torch.device, dtype: torch.dtype, n: int = 8192) -> float:
    a = torch.randn(n, n, device=where, dtype=dtype)
    b = torch.randn(n, n, device=where, dtype=dtype)
    return 2 * n**3 / _median_seconds(lambda: torch.matmul(a, b))


def _median_seconds(launch: Callable[[], object], repeats: int = 10) -> float:
    """Median device time of one launch, after three untimed ones."""
    for _ in range(3):
        launch()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        launch()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[len(times) // 2]


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
