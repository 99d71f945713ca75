"""Where the memory went: what the engine knows, what torch knows, what the device and the host say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from backbench.backends.interface import Device


def idle_device_bytes(device: Device) -> int | None:
    """Device memory in use before the engine opens (other processes, the driver); None on a CPU."""
    if device.torch_device.type == "cpu":
        return None
    import torch

    free, total = torch.cuda.mem_get_info(device.torch_device)
    torch.cuda.reset_peak_memory_stats(device.torch_device)
    return int(total - free)


def section(
    engine: dict[str, int],
    device: Device,
    idle_bytes: int | None,
    telemetry: pd.DataFrame,
    reachable: bool = True,
) -> dict[str, Any]:
    """The record's `memory` section; `engine` is `Engine.memory()`.

    The total is what this process took: the device's peak above idle on a GPU, the peak resident set on a
    CPU. Weights, KV pool and `other_bytes` add up to it. A GPU that a fault left not `reachable` is not
    asked: what its sensors said before counts.
    """
    result: dict[str, Any] = {
        **engine,
        "host_rss_peak_bytes": _peak(telemetry["host_rss_bytes"]),
        "torch_allocated_peak_bytes": None,
        "torch_reserved_peak_bytes": None,
        "device_used_peak_minus_idle_bytes": None,
        "capacity_bytes": device.memory_bytes,
    }
    if device.torch_device.type == "cpu":
        total = result["host_rss_peak_bytes"]
    elif reachable:
        total = _device_peaks(result, device, idle_bytes, telemetry)
    else:
        peak = _peak(telemetry["memory_used_bytes"])
        total = None if peak is None or idle_bytes is None else peak - idle_bytes
        result["device_used_peak_minus_idle_bytes"] = total
    result["total_bytes"] = total
    # Untouched pool pages are not resident on a CPU, so the parts may exceed the whole there.
    rest = None if total is None else total - engine["weights_bytes"] - engine["kv_pool_bytes"]
    result["other_bytes"] = rest if rest is None or rest >= 0 else None
    return result


def _device_peaks(
    result: dict[str, Any], device: Device, idle_bytes: int | None, telemetry: pd.DataFrame
) -> int | None:
    import torch

    free, total = torch.cuda.mem_get_info(device.torch_device)
    # Torch keeps what it reserved, so what is used now is a floor even where nothing was sampled.
    used = max(int(total - free), _peak(telemetry["memory_used_bytes"]) or 0)
    result["torch_allocated_peak_bytes"] = torch.cuda.max_memory_allocated(device.torch_device)
    result["torch_reserved_peak_bytes"] = torch.cuda.max_memory_reserved(device.torch_device)
    result["device_used_peak_minus_idle_bytes"] = None if idle_bytes is None else used - idle_bytes
    return result["device_used_peak_minus_idle_bytes"]


def _peak(column: pd.Series) -> int | None:
    known = column.dropna()
    return None if known.empty else int(known.max())
