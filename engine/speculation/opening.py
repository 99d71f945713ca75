"""From what was asked for to a speculator: finding, loading and checking the model that drafts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from backbench.backends.interface import Device, Operations, Selection, WeightSpec
from backbench.backends.registry import BETWEEN_DEVICES, select
from backbench.engine.config import EngineConfig
from backbench.engine.limits import EngineLimits, StepLimits
from backbench.engine.models.checkpoint import DirectorySource, ModelSource, find_model
from backbench.engine.models.config import ModelConfig
from backbench.engine.models.decoder import Decoder, attention_specs
from backbench.engine.models.eagle3 import Eagle3Head
from backbench.engine.models.eagle3_checkpoint import head_config, load_head
from backbench.engine.speculation.asked import Speculation
from backbench.engine.speculation.draft import DraftProposer
from backbench.engine.speculation.eagle3 import Eagle3Proposer, HiddenStateTap
from backbench.engine.speculation.ngram import NgramProposer
from backbench.engine.speculation.proposer import Proposer
from backbench.engine.speculation.speculator import Speculator
from backbench.engine.speculation.synthetic import SyntheticProposer
from backbench.errors import EngineError

Served = Callable[[ModelConfig, Sequence[WeightSpec]], Selection]
"""What serves a model with these products."""


@dataclass(frozen=True)
class DraftModel:
    """The model that drafts, whole on the first device, and loaded before the KV pool is sized: both take the
    same memory."""

    decoder: Decoder
    operations: Operations
    facts: dict[str, Any]
    """Which model it is, for the record."""
    tap: HiddenStateTap | None = None
    """What it asks of the target's steps; None = nothing."""

    @classmethod
    def open(
        cls,
        asked: Speculation,
        target: ModelConfig,
        *,
        backend: str,
        device: Device,
        dtype: torch.dtype,
        limits: StepLimits,
        overrides: Mapping[str, str] | None,
    ) -> DraftModel:
        """Raises EngineError where the model cannot draft for `target`, BackendError where none serves it."""
        assert asked.model is not None
        source = find_model(asked.model)

        def served(config: ModelConfig, weights: Sequence[WeightSpec]) -> Selection:
            return select(
                backend,
                device=device,
                specs=attention_specs(config, dtype=dtype, limits=limits),
                weights=weights,
                dtype=dtype,
                overrides={name: each for name, each in (overrides or {}).items() if name != BETWEEN_DEVICES},
            )

        if asked.proposer == "eagle3":
            return HeadModel.of(source, target, served, device=device, dtype=dtype, limits=limits)
        model = source.config
        if model.vocab_size != target.vocab_size:
            raise EngineError(
                f"{asked.model} has {model.vocab_size} tokens and the model {target.vocab_size}; one that "
                "drafts needs the same vocabulary."
            )
        if model.max_len < limits.max_len:
            raise EngineError(
                f"{asked.model} has a context of {model.max_len}, below {limits.max_len}; lower --max-len."
            )
        selection = served(model, model.spec.weight_specs(dtype))
        loaded = source.load_weights(device.torch_device, dtype)
        plain = Decoder(model, loaded, selection, dtype=dtype, limits=limits)
        facts = {key: source.describe()[key] for key in ("name", "revision", "num_parameters")}
        return cls(plain, selection.operations, facts)

    def proposer(self, target: Decoder, limits: EngineLimits, **settings: bool) -> DraftProposer:
        """What drafts for `target`, with the settings of `DraftProposer`."""
        return DraftProposer(self.decoder, self.operations, limits, **settings)


@dataclass(frozen=True)
class HeadModel(DraftModel):
    """A head over the target's hidden states."""

    @classmethod
    def of(
        cls,
        source: ModelSource,
        target: ModelConfig,
        served: Served,
        *,
        device: Device,
        dtype: torch.dtype,
        limits: StepLimits,
    ) -> HeadModel:
        """As `DraftModel.open`."""
        if not isinstance(source, DirectorySource):
            raise EngineError(f"{source.name} is no EAGLE-3 head; give a checkpoint's directory or hub id.")
        config = head_config(source.name, source.path, source.hf_config, target)
        selection = served(config, config.weight_specs(dtype))
        weights = load_head(source.path, config, device.torch_device, dtype)
        facts = {
            "name": source.name,
            "revision": source.revision,
            "num_parameters": weights.num_parameters,
        }
        head = Eagle3Head(config, weights, selection, dtype=dtype, limits=limits)
        return cls(head, selection.operations, facts, HiddenStateTap(head))

    def proposer(self, target: Decoder, limits: EngineLimits, **settings: bool) -> DraftProposer:
        assert isinstance(self.decoder, Eagle3Head) and self.tap is not None
        assert target.weights.embedding is not None, "layers are not divided where something drafts"
        self.decoder.share_embedding(target.weights.embedding)
        return Eagle3Proposer(self.decoder, self.operations, limits, self.tap, **settings)


def open_speculator(
    config: EngineConfig, limits: EngineLimits, target: Decoder, draft: DraftModel | None
) -> Speculator | None:
    """What `config.speculate` asks for; None = nothing. draft: the model, where it asks for one."""
    asked = config.speculation
    if asked is None:
        return None
    rejection = config.speculation_sampling == "rejection"
    graphs = config.graphs and not rejection
    proposer: Proposer
    if draft is not None:
        proposer = draft.proposer(target, limits, graphs=graphs, keep_probabilities=rejection)
    elif asked.proposer == "synthetic":
        proposer = SyntheticProposer(asked.rates, target.config.vocab_size)
    else:
        proposer = NgramProposer()
    facts = None if draft is None else draft.facts
    return Speculator(
        proposer, asked.tokens, adaptive=config.adaptive_drafts, rejection=rejection, draft_model=facts
    )
