"""Collectives through `torch.distributed`: NCCL, RCCL on AMD, or gloo on a CPU."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from backbench.backends.interface import Collectives, Communicator, Device, Peers, Way

_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""What torch 2.13 calls it, and torch 2.11."""


def default_group() -> dist.ProcessGroup:
    """The one that all ranks have joined."""
    group = dist.group.WORLD
    assert group is not None
    return group


class TorchCollectives(Collectives):
    """The vendor's library, whatever the size."""

    name = "torch"

    def refusals(self, device: Device, world: int) -> list[str]:
        return [] if dist.is_available() else ["this build of torch has no torch.distributed"]

    def open(self, peers: Peers) -> Communicator:
        return TorchCommunicator(peers)


class TorchCommunicator(Communicator):
    """The default group's collectives."""

    def __init__(self, peers: Peers) -> None:
        super().__init__(peers)
        on_gpu = peers.torch_device.type == "cuda"
        self.capturable = on_gpu
        self.library = ("RCCL" if torch.version.hip is not None else "NCCL") if on_gpu else "gloo"

    def all_reduce(self, x: Tensor) -> Tensor:
        dist.all_reduce(x)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        out = x.new_empty((self.world, *x.shape))
        _gather(out.view(-1), x.view(-1))
        return out

    def send(self, x: Tensor, to: int) -> None:
        dist.send(x, to)

    def recv(self, x: Tensor, source: int) -> None:
        dist.recv(x, source)

    def ways(self) -> list[Way]:
        return [Way(operation, None, self.library) for operation in ("all_reduce", "all_gather")]

    def abort(self) -> None:
        """NCCL's kernels would wait for ever; gloo notices a closed connection by itself."""
        if self.peers.torch_device.type == "cuda" and dist.is_initialized():
            default_group()._get_backend(self.peers.torch_device).abort()
