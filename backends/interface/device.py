"""What hardware this process runs on, as far as a kernel choice depends on it."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from backbench.errors import BackendError


@dataclass(frozen=True)
class Device:
    """The hardware a backend runs on, as far as a kernel choice depends on it."""

    vendor: str
    """"nvidia", "amd" or "cpu"."""
    arch: str
    """"sm90", "gfx942", "x86_64", ..."""
    name: str
    """Product name as the driver reports it."""
    units: int
    """Streaming multiprocessors, compute units, or CPU cores."""
    memory_bytes: int
    shared_bytes: int
    """Largest shared memory (LDS) one block may use; 0 on a CPU."""
    torch_device: torch.device
    interpret: bool = False
    """True when Triton kernels run in its interpreter (correctness only)."""


def detect(interpret: bool = False, prefer: str | None = None) -> Device:
    """The device to run on: an NVIDIA or AMD GPU where torch sees one, else the CPU.

    Args:
        interpret: run Triton kernels in their interpreter, on CPU tensors (correctness only).
        prefer: "cpu", "cuda" or "cuda:N" (also for AMD, as in torch) instead of the default choice.

    Raises:
        BackendError: `prefer` names a device that is not there.
    """
    try:
        wanted = torch.device(prefer) if prefer is not None else None
    except RuntimeError:
        raise BackendError(f"Unknown device {prefer!r}; use cpu, cuda or cuda:N.") from None
    if wanted is not None and wanted.type not in ("cpu", "cuda"):
        raise BackendError(f"Unknown device {prefer!r}; use cpu, cuda or cuda:N.")
    wants_gpu = wanted is not None and wanted.type == "cuda"
    if interpret and wants_gpu:
        raise BackendError("The Triton interpreter runs on the CPU; leave out the device or the interpreter.")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wants_gpu and wanted is not None and (wanted.index or 0) >= count:
        raise BackendError(
            f"Device {prefer!r} is not there: torch sees {count} GPUs; use cpu or a lower number."
        )
    if interpret or count == 0 or (wanted is not None and wanted.type == "cpu"):
        return cpu(interpret)
    current = torch.cuda.current_device()
    index = wanted.index or 0 if wanted is not None else current
    if index != current:
        torch.cuda.set_device(index)  # kernels are launched on the current one
    return gpu(index)


def gpu(index: int) -> Device:
    """The `index`-th GPU that torch sees, of either vendor."""
    properties = torch.cuda.get_device_properties(index)
    amd = torch.version.hip is not None
    if amd:
        arch = properties.gcnArchName.split(":")[0]  # "gfx942:sramecc+:xnack-" names features too
    else:
        arch = f"sm{properties.major}{properties.minor}"
    shared = getattr(properties, "shared_memory_per_block_optin", 0)
    return Device(
        vendor="amd" if amd else "nvidia",
        arch=arch,
        name=properties.name,
        units=properties.multi_processor_count,
        memory_bytes=properties.total_memory,
        shared_bytes=shared or properties.shared_memory_per_block,
        torch_device=torch.device("cuda", index),
    )


def cpu(interpret: bool = False) -> Device:
    """This process's share of the CPU."""
    affinity = getattr(os, "sched_getaffinity", None)
    return Device(
        vendor="cpu",
        arch=platform.machine(),
        name=cpu_name(),
        units=len(affinity(0)) if affinity is not None else os.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().total,
        shared_bytes=0,
        torch_device=torch.device("cpu"),
        interpret=interpret,
    )


def kernels_refused(device: Device) -> list[str]:
    """Why Triton kernels cannot run on `device`; empty = they can."""
    if device.vendor != "cpu" or device.interpret:
        return []
    return ["needs an NVIDIA or AMD GPU; use --backend torch, or --interpret for correctness"]


def cpu_name() -> str:
    """The CPU's product name where the system tells it, else its architecture."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
