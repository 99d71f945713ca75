"""Where the memory went: what the subject knows, what torch knows, what the device and the host say."""

from __future__ import annotations

import ctypes
import gc
import os
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from backbench.backends.interface import Device


@dataclass(frozen=True)
class Readings:
    """Bytes that no sample of the telemetry shows, of one run; None = unknown."""

    weights_bytes: int | None = None
    weights_read_bytes: int | None = None
    """Of them, what every step reads."""
    kv_pool_bytes: int | None = None
    kv_used_peak_bytes: int | None = None
    capacity_bytes: int | None = None
    """What the device, or the host where there is none, holds."""
    on_device: bool = False
    """An accelerator's memory is meant, not the host's."""
    device_idle_bytes: int | None = None
    """In use on the device before this process took it: other processes and the driver."""
    device_used_bytes: int | None = None
    """The same at the run's end, by the same counter; None where telemetry samples that."""
    torch_allocated_peak_bytes: int | None = None
    torch_reserved_peak_bytes: int | None = None
    devices: list[dict[str, Any]] = field(default_factory=list)
    """Bytes on each device, by rank, where there are several; the numbers above are of the first."""


def idle_device_bytes(device: Device, accelerator: dict[str, Any]) -> int | None:
    """Device memory in use before this process took any; None on a CPU.

    `accelerator` is what the driver said of the card while this process had no context on it. A context
    takes hundreds of MiB, is a price of the run, and torch cannot be asked without making one. So the
    driver's counter, which also the telemetry samples, is the one that peaks are held against. Only where
    it is missing is torch's used for both; then the context is inside both and in no difference, as it
    is in a process that has run an experiment before.
    """
    if device.torch_device.type == "cpu":
        return None
    known = accelerator.get("idle_memory_bytes")
    return torch_used_bytes(device) if known is None else int(known)


def torch_used_bytes(device: Device) -> int:
    """Device memory in use by anyone, by CUDA's own counter."""
    import torch

    free, total = torch.cuda.mem_get_info(device.torch_device)
    return int(total - free)


def reset_peaks(device: Device) -> None:
    """Forget torch's peaks, so that those of a run are its own."""
    if device.torch_device.type != "cpu":
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device.torch_device)


def give_back() -> None:
    """Return this process's free memory to the system, so that the resident set of a run is its own.

    glibc keeps freed memory of the run before, and of the check of its results, until it is asked.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def with_device(readings: Readings, device: Device, sampled: bool) -> Readings:
    """`readings` with what torch and CUDA say of a GPU now; `sampled`: telemetry has the driver's counter."""
    import torch

    return replace(
        readings,
        device_used_bytes=None if sampled else torch_used_bytes(device),
        torch_allocated_peak_bytes=torch.cuda.max_memory_allocated(device.torch_device),
        torch_reserved_peak_bytes=torch.cuda.max_memory_reserved(device.torch_device),
    )


def section(readings: Readings, telemetry: pd.DataFrame) -> dict[str, Any]:
    """The record's `memory` section.

    The total is what this process took: the device's peak above idle on a GPU, the peak resident set on a
    CPU. Weights, KV pool and `other_bytes` add up to it.
    """
    host_peak = _peak(telemetry["host_rss_bytes"])
    device_peak = _peak(telemetry["memory_used_bytes"])
    if device_peak is None:
        device_peak = readings.device_used_bytes
    above_idle = None
    if device_peak is not None and readings.device_idle_bytes is not None:
        above_idle = device_peak - readings.device_idle_bytes
    total = above_idle if readings.on_device else host_peak
    known = [readings.weights_bytes, readings.kv_pool_bytes]
    # Untouched pool pages are not resident on a CPU, so the parts may exceed the whole there.
    rest = None if total is None or None in known else total - sum(each or 0 for each in known)
    devices = readings.devices
    held = sum(each["weights_bytes"] + each["kv_pool_bytes"] for each in devices)
    several = {"devices": devices, "devices_held_bytes": held} if devices else {}
    return several | {
        "weights_bytes": readings.weights_bytes,
        "weights_read_bytes": readings.weights_read_bytes,
        "kv_pool_bytes": readings.kv_pool_bytes,
        "kv_used_peak_bytes": readings.kv_used_peak_bytes,
        "host_rss_peak_bytes": host_peak,
        "torch_allocated_peak_bytes": readings.torch_allocated_peak_bytes,
        "torch_reserved_peak_bytes": readings.torch_reserved_peak_bytes,
        "device_idle_bytes": readings.device_idle_bytes,
        "device_used_peak_minus_idle_bytes": above_idle,
        "capacity_bytes": readings.capacity_bytes,
        "total_bytes": total,
        "other_bytes": rest if rest is None or rest >= 0 else None,
    }


def _peak(column: pd.Series) -> int | None:
    known = column.dropna()
    return None if known.empty else int(known.max())
