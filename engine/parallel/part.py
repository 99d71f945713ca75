"""One rank's part of an engine, opened alike by every rank: its weights, its backend, its sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from backbench.backends.interface import Communicator, Device, Peers, Selection, Single
from backbench.backends.registry import select
from backbench.backends.torch.collectives import TorchCommunicator
from backbench.engine.config import EngineConfig
from backbench.engine.limits import EngineLimits, realise_limits, realise_pool
from backbench.engine.models.decoder import Decoder, Tap, attention_specs
from backbench.engine.models.layers import Shard
from backbench.engine.models.weights import Weights
from backbench.engine.parallel.pipe import Pipe, stage_of

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

    @property
    def kv_dtype(self) -> torch.dtype | None:
        """Of the KV cache; None = `dtype`."""
        return None if self.config.kv_dtype is None else getattr(torch, self.config.kv_dtype)

    def selection(self, device: Device) -> Selection:
        """What serves each operation on a device like this one, of as many as the config asks for.

        Raises EngineError or BackendError where the model, divided so, cannot be served.
        """
        model, world = self.source.config, self.config.tp
        limits = realise_limits(self.config, model, device)
        model.spec.stage_layers(self.config.pp)  # too many are refused here
        return select(
            self.backend,
            device=device,
            specs=attention_specs(
                model, dtype=self.dtype, limits=limits, kv_dtype=self.kv_dtype, world=world
            ),
            weights=model.spec.divided(world).weight_specs(self.dtype),
            dtype=self.dtype,
            overrides=self.overrides,
            world=world,
        )


@dataclass(frozen=True)
class Part:
    """What one rank runs."""

    decoder: Decoder
    selection: Selection
    limits: EngineLimits
    weights: Weights
    communicator: Communicator
    """Its end of what connects all ranks."""
    pipe: Pipe | None
    """Where the ranks divide the layers."""


def open_part(
    job: Job,
    peers: Peers,
    weights: Weights | None = None,
    *,
    drafting_bytes_per_block: int = 0,
    tap: Tap | None = None,
) -> Part:
    """Choose the backend, load the rank's weights and size the engine; all ranks do so at once.

    weights: those of an engine alike; None = loaded here. drafting_bytes_per_block: what a model that drafts,
    loaded before, keeps for each KV block. tap: of the hidden states of the engine's steps. Raises
    EngineError or BackendError with one line.
    """
    config, device = job.config, peers.device
    selection = job.selection(device)
    limits = realise_limits(config, job.source.config, device)
    stage = stage_of(peers.rank, config.pp)
    library = None if stage.stages == 1 else TorchCommunicator(peers)
    communicator = library or communicator_of(selection, peers)
    if weights is None:
        held: dict[str, Any] = {} if config.tp == 1 else {"shard": Shard(peers.rank, config.tp)}
        held |= {} if stage.stages == 1 else {"stage": stage}
        weights = job.source.load_weights(device.torch_device, job.dtype, **held)
    decoder = Decoder(
        job.source.config,
        weights,
        selection,
        dtype=job.dtype,
        limits=limits,
        kv_dtype=job.kv_dtype,
        communicator=communicator if library is None else None,
        stage=stage,
        tap=tap,
    )
    pipe = None if library is None else Pipe(decoder, library, limits.max_batch_tokens)
    sized = realise_pool(config, limits, decoder, device, drafting_bytes_per_block)
    sized = replace(sized, num_blocks=fewest(sized.num_blocks, communicator))
    return Part(decoder, selection, sized, weights, communicator, pipe)


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
