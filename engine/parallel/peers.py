"""Joining and leaving the group of ranks: the one thing `torch.distributed` keeps for the whole process."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from backbench.backends.interface import Device, Peers
from backbench.errors import EngineError

JOINING_S = 120.0
"""How long ranks wait for each other to meet, and at most in one call of a library."""


def join(rank: int, world: int, device: Device, folder: Path) -> Peers:
    """Meet the other ranks in a file of `folder`, no port; returns when all are there.

    Raises EngineError where this process is in a group already.
    """
    if dist.is_initialized():
        raise EngineError("This process has an engine over several devices already; close it first.")
    at = device.torch_device
    if at.type == "cuda":
        torch.cuda.set_device(at)
    store = dist.FileStore(str(folder / "ranks"), world)
    dist.init_process_group(
        "nccl" if at.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=JOINING_S),
        device_id=at if at.type == "cuda" else None,
    )
    return Peers(rank, world, device, folder)


def leave() -> None:
    """Leave the group; graphs that captured its calls must be gone before."""
    if dist.is_initialized():
        dist.destroy_process_group()
