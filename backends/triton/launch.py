"""What every Triton launch here shares: programmatic dependent launch, and the device's few facts.

With programmatic dependent launch (NVIDIA sm90 and newer) a kernel starts while its predecessor drains:
each kernel first lets its successor start, does what depends on no other kernel (fetching weights), and
then waits until its predecessor has finished and its writes are visible. Because every kernel launched
this way waits before it reads or writes shared buffers, completion stays transitive along the stream.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def release_successor(PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Let the next kernel in the stream start its prologue."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait_for_predecessor(PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Block until the previous kernel in the stream has finished and its writes are visible."""
    if PDL:
        gdc_wait()


@lru_cache
def compute_units(device: torch.device) -> int:
    """Streaming multiprocessors or compute units of `device`; 1 on a CPU (the interpreter)."""
    if device.type == "cpu":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache
def architecture(device: torch.device) -> str:
    """ "sm90", "gfx942", ...; "cpu" where kernels run in the interpreter."""
    if device.type == "cpu":
        return "cpu"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm{properties.major}{properties.minor}"


@lru_cache
def overlaps_launches(device: torch.device) -> bool:
    """True where programmatic dependent launch exists: NVIDIA, compute capability 9.0 and newer."""
    return speaks_ptx(device) and int(architecture(device)[2:]) >= 90


def speaks_ptx(device: torch.device) -> bool:
    """True where inline PTX assembles: compiled for an NVIDIA GPU."""
    return device.type == "cuda" and torch.version.hip is None


def overlap(x: Tensor) -> dict[str, Any]:
    """Launch keywords for a kernel with a `PDL` parameter that runs on x's device."""
    if overlaps_launches(x.device):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


def interpreted(kernel: Any) -> bool:
    """True when `kernel` was decorated under TRITON_INTERPRET=1."""
    return not isinstance(kernel, triton.runtime.JITFunction)
