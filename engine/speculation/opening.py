"""From what was asked for to a speculator: finding, loading and checking the model that drafts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from backbench.backends.interface import Device, Operations
from backbench.backends.registry import BETWEEN_DEVICES, select
from backbench.engine.config import EngineConfig
from backbench.engine.limits import EngineLimits, StepLimits
from backbench.engine.models.checkpoint import find_model
from backbench.engine.models.config import ModelConfig
from backbench.engine.models.decoder import Decoder, attention_specs
from backbench.engine.speculation.asked import Speculation
from backbench.engine.speculation.draft import DraftProposer
from backbench.engine.speculation.ngram import NgramProposer
from backbench.engine.speculation.proposer import Proposer
from backbench.engine.speculation.speculator import Speculator
from backbench.engine.speculation.synthetic import SyntheticProposer
from backbench.errors import EngineError


@dataclass(frozen=True)
class DraftModel:
    """The model that drafts, whole on the first device, and loaded before the KV pool is sized: both take the
    same memory."""

    decoder: Decoder
    operations: Operations
    facts: dict[str, Any]
    """Which model it is, for the record."""

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
        selection = select(
            backend,
            device=device,
            specs=attention_specs(model, dtype=dtype, limits=limits),
            weights=model.spec.weight_specs(dtype),
            dtype=dtype,
            overrides={name: each for name, each in (overrides or {}).items() if name != BETWEEN_DEVICES},
        )
        weights = source.load_weights(device.torch_device, dtype)
        decoder = Decoder(model, weights, selection, dtype=dtype, limits=limits)
        facts = {key: source.describe()[key] for key in ("name", "revision", "num_parameters")}
        return cls(decoder, selection.operations, facts)


def open_speculator(
    config: EngineConfig, limits: EngineLimits, vocab_size: int, draft: DraftModel | None
) -> Speculator | None:
    """What `config.speculate` asks for; None = nothing. draft: the model, where it asks for one."""
    asked = config.speculation
    if asked is None:
        return None
    rejection = config.speculation_sampling == "rejection"
    graphs = config.graphs and not rejection
    proposer: Proposer
    if draft is not None:
        proposer = DraftProposer(
            draft.decoder, draft.operations, limits, graphs=graphs, keep_probabilities=rejection
        )
    elif asked.proposer == "synthetic":
        proposer = SyntheticProposer(asked.rates, vocab_size)
    else:
        proposer = NgramProposer()
    facts = None if draft is None else draft.facts
    return Speculator(
        proposer, asked.tokens, adaptive=config.adaptive_drafts, rejection=rejection, draft_model=facts
    )
