"""One rank's part of an engine, opened alike by every rank: its weights, its backend, its sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from backbench.backends.interface import Communicator, Device, Peers, Selection, Single
from backbench.backends.registry import select
from backbench.engine.config import EngineConfig
from backbench.engine.limits import EngineLimits, realise_limits, realise_pool
from backbench.engine.models.decoder import Decoder, attention_specs
from backbench.engine.models.layers import Shard
from backbench.engine.models.weights import Weights

if TYPE_CHECKING:
    from backbench.engine.models.checkpoint import ModelSource


@dataclass(frozen=True)
class Job:
    """What an engine is opened with; it can be pickled."""

    source: ModelSource
    backend: str
    dtype: torch.dtype
    config: EngineConfig
    overrides: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """What one rank runs."""

    decoder: Decoder
    selection: Selection
    limits: EngineLimits
    weights: Weights


def open_part(job: Job, peers: Peers, weights: Weights | None = None) -> Part:
    """Choose the backend, load the rank's weights and size the engine; all ranks do so at once.

    weights: those of an engine alike; None = loaded here. Raises EngineError or BackendError with one line.
    """
    config, model, device, world = job.config, job.source.config, peers.device, peers.world
    limits = realise_limits(config, model, device)
    kv_dtype = None if config.kv_dtype is None else getattr(torch, config.kv_dtype)
    specs = attention_specs(model, dtype=job.dtype, limits=limits, kv_dtype=kv_dtype, world=world)
    selection = select(
        job.backend,
        device=device,
        specs=specs,
        weights=model.spec.divided(world).weight_specs(job.dtype),
        dtype=job.dtype,
        overrides=job.overrides,
        world=world,
    )
    communicator = communicator_of(selection, peers)
    if weights is None:
        shard = () if world == 1 else (Shard(peers.rank, world),)
        weights = job.source.load_weights(device.torch_device, job.dtype, *shard)
    decoder = Decoder(
        model,
        weights,
        selection,
        dtype=job.dtype,
        limits=limits,
        kv_dtype=kv_dtype,
        communicator=communicator,
    )
    sized = realise_pool(config, limits, decoder, device)
    return Part(
        decoder, selection, replace(sized, num_blocks=fewest(sized.num_blocks, communicator)), weights
    )


def communicator_of(selection: Selection, peers: Peers) -> Communicator:
    """This rank's end of the selected collectives."""
    return Single(peers) if selection.collectives is None else selection.collectives.open(peers)


def fewest(number: int, communicator: Communicator) -> int:
    """The least of every rank's `number`."""
    own = torch.tensor([number], dtype=torch.int64, device=communicator.peers.torch_device)
    return int(communicator.all_gather(own).min())


def device_of(first: Device, rank: int) -> Device:
    """The device of a rank, counted from the first one's; a CPU is shared."""
    if first.torch_device.type == "cpu":
        return first
    from backbench.backends.interface.device import gpu

    return gpu((first.torch_device.index or 0) + rank)
