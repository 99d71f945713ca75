"""Sums and exchanges between the devices that share one model, and what an implementation must offer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from backbench.backends.interface.device import Device


@dataclass(frozen=True)
class Peers:
    """One of the processes that share a model, each with a device of its own.

    Where there are several, `torch.distributed`'s default group is theirs: that is how they find each other.
    """

    rank: int
    world: int
    """How many there are."""
    device: Device
    folder: Path | None = None
    """A folder of this host that all of them know, for what they exchange before they can talk."""

    @property
    def torch_device(self) -> torch.device:
        """This process's device."""
        return self.device.torch_device


class Way(NamedTuple):
    """What serves one operation up to a size."""

    operation: str
    """"all_reduce" or "all_gather"."""
    up_to_bytes: int | None
    """Of one device's input; None = any size."""
    served_by: str


class Communicator(ABC):
    """This process's end of a group. Every member calls the same operations in the same order.

    Results have the same bits on every member, so that all of them sample the same tokens.
    """

    capturable: bool = False
    """Whether calls may be captured in a device graph; a first call outside of one comes before."""

    def __init__(self, peers: Peers) -> None:
        self.peers = peers

    @property
    def rank(self) -> int:
        """This member's number, from 0."""
        return self.peers.rank

    @property
    def world(self) -> int:
        """Members."""
        return self.peers.world

    @abstractmethod
    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of everyone's contiguous `x`, which may be overwritten and returned."""

    @abstractmethod
    def all_gather(self, x: Tensor) -> Tensor:
        """[world, *x.shape]: everyone's contiguous `x`, in order of rank."""

    @abstractmethod
    def send(self, x: Tensor, to: int) -> None:
        """Give contiguous `x` to member `to`, which receives a tensor of that shape and dtype."""

    @abstractmethod
    def recv(self, x: Tensor, source: int) -> None:
        """Fill contiguous `x` with what member `source` sends."""

    @abstractmethod
    def ways(self) -> list[Way]:
        """What serves which sizes, for the record: of each operation the smallest sizes first."""

    def served_by(self, operation: str, num_bytes: int) -> str:
        """What serves an input of this size."""
        return next(
            way.served_by
            for way in self.ways()
            if way.operation == operation and (way.up_to_bytes is None or num_bytes <= way.up_to_bytes)
        )

    def abort(self) -> None:  # noqa: B027
        """Let go of whatever waits for a member that is gone; results are worthless from here on."""

    def close(self) -> None:  # noqa: B027
        """Give back what was shared; graphs that captured calls must be gone before."""


class Single(Communicator):
    """A group of one: everything is there already."""

    capturable = True

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return x[None]

    def send(self, x: Tensor, to: int) -> None:
        raise ValueError("A group of one has nobody to send to.")

    def recv(self, x: Tensor, source: int) -> None:
        raise ValueError("A group of one has nobody to receive from.")

    def ways(self) -> list[Way]:
        return []


class Collectives(ABC):
    """A named implementation of collectives."""

    name: str

    @abstractmethod
    def refusals(self, device: Device, world: int) -> list[str]:
        """Reasons this cannot serve `world` devices like this one; empty = it can, as far as can be known
        before they meet."""

    @abstractmethod
    def open(self, peers: Peers) -> Communicator:
        """This process's end; every member opens at once.

        Raises BackendError where they cannot reach each other in the way this needs.
        """
