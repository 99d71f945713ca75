"""Who sums between devices: the backend's own, its base's, or the one named; and a group of one."""

from __future__ import annotations

import pytest
import torch

from backbench.backends.interface import AttentionSpec, Peers, Single, Way
from backbench.backends.interface.device import cpu
from backbench.backends.registry import select
from backbench.backends.torch.collectives import TorchCommunicator
from backbench.backends.triton.collectives import OneShotCollectives, largest_bytes
from backbench.errors import BackendError

SPEC = AttentionSpec(4, 2, 16, torch.float32, torch.float32, 16, 0.25)


def used(name: str, world: int, interpret: bool = False, **overrides: str) -> dict[str, str]:
    device = cpu(interpret)
    found = select(name, device=device, specs=[SPEC], dtype=torch.float32, overrides=overrides, world=world)
    return found.used


def test_one_device_needs_none() -> None:
    assert "collectives" not in used("torch", 1)
    with pytest.raises(BackendError, match="--collectives is for several devices; give --tp as well"):
        used("torch", 1, collectives="torch")


def test_several_take_the_backends_own_its_bases_or_the_one_named() -> None:
    assert used("torch", 2)["collectives"] == "torch"
    assert used("sdpa", 2)["collectives"] == "torch"
    assert used("triton", 2, interpret=True)["collectives"] == "oneshot"
    assert used("triton", 2, interpret=True, collectives="torch")["collectives"] == "torch"
    assert used("auto", 2)["collectives"] == "torch"


def test_what_cannot_serve_is_refused_with_the_reason() -> None:
    with pytest.raises(BackendError, match="oneshot collectives: needs an NVIDIA or AMD GPU"):
        used("torch", 2, collectives="triton")
    with pytest.raises(BackendError, match="Backend 'sdpa' offers no collectives"):
        used("torch", 2, collectives="sdpa")
    (reason,) = OneShotCollectives().refusals(cpu(interpret=True), 16)
    assert reason == "one shot is for at most 8 devices of one host, not 16"


def test_a_group_of_one_has_everything() -> None:
    alone, x = Single(Peers(0, 1, cpu())), torch.arange(6.0).reshape(2, 3)
    assert alone.all_reduce(x) is x
    assert torch.equal(alone.all_gather(x), x[None])
    assert alone.ways() == []


def test_what_serves_which_size_is_said() -> None:
    library = TorchCommunicator(Peers(0, 2, cpu()))
    assert library.ways() == [Way("all_reduce", None, "gloo"), Way("all_gather", None, "gloo")]
    assert library.served_by("all_gather", 10**9) == "gloo"
    assert [largest_bytes(world) for world in (2, 4, 5)] == [8 * 2**20, 512 * 2**10, 256 * 2**10]
