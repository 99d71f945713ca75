"""Calibration sequences on their way through a decoder, layer by layer, and what its products are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from backbench.backends.interface import Device, Linear, Scheme, Weight, WeightSpec
from backbench.backends.registry import select
from backbench.engine.limits import StepLimits
from backbench.engine.models.config import ModelConfig
from backbench.engine.models.decoder import Decoder, attention_specs, whole_sequences
from backbench.engine.models.weights import LayerWeights, Weights

BLOCK_SIZE = 16
PRODUCTS = ("qkv", "attention_output", "gate_up", "down")


@dataclass
class InputStatistics:
    """Of all rows x that one product [N, K] is given. Empty until `add` has seen one."""

    rows: int = 0
    gram: Tensor = field(default_factory=lambda: torch.zeros(()))
    """f64 [K, K]: the sum of x x^T, half of the Hessian of the squared error of one output feature."""
    magnitude: Tensor = field(default_factory=lambda: torch.zeros(()))
    """f64 [K]: the sum of |x|."""

    def add(self, x: Tensor) -> None:
        """Count rows x [M, K]; each call's sum is in fp32, their sum in fp64."""
        x = x.float()
        self.rows += x.shape[0]
        self.gram = self.gram.to(x.device) + (x.T @ x).double()
        self.magnitude = self.magnitude.to(x.device) + x.abs().double().sum(0)

    @property
    def norms(self) -> Tensor:
        """f32 [K]: the Euclidean norm of each feature over all rows."""
        return self.gram.diagonal().sqrt().float()

    @property
    def mean_magnitude(self) -> Tensor:
        """f32 [K]: the mean of |x|."""
        return (self.magnitude / self.rows).float()


class Watching(Linear):
    """Another implementation, which counts the rows that weights are multiplied by."""

    def __init__(self, inner: Linear, watched: Sequence[tuple[Weight, InputStatistics]]) -> None:
        self.inner = inner
        self.watched = watched
        self.name = inner.name

    def refusals(self, spec: WeightSpec, device: Device) -> list[str]:
        return self.inner.refusals(spec, device)

    def pack(self, weight: Weight, device: Device) -> Any:
        statistics = next((found for each, found in self.watched if each is weight), None)
        return self.inner.pack(weight, device), statistics

    def run(self, x: Tensor, packed: Any, bias: Tensor | None = None) -> Tensor:
        held, statistics = packed
        if statistics is not None:
            statistics.add(x)
        return self.inner.run(x, held, bias)


class LayerByLayer:
    """Hidden states of every calibration sequence before some layer, in fp32, through the torch backend.

    Each layer is a decoder of its own, whose embedding is the hidden states that the layers before have left:
    only one layer's weights are needed at a time.
    """

    def __init__(
        self, config: ModelConfig, device: Device, embedding: Tensor, sequences: Sequence[Sequence[int]]
    ) -> None:
        """embedding: [V, H] on the device."""
        self.config = config
        self.device = device
        ids = [torch.tensor(each, dtype=torch.int64, device=embedding.device) for each in sequences]
        self.hidden = [embedding[each].float() for each in ids]
        """[tokens, H] of each sequence."""

    def observe(self, index: int, layer: LayerWeights) -> Mapping[str, InputStatistics]:
        """Role -> what each product of layer `index` is given, its weights dense and in fp32."""
        found = {role: InputStatistics() for role in PRODUCTS}
        watched = [(getattr(layer, role), statistics) for role, statistics in found.items()]
        self._run(index, layer, watched)
        return found

    def advance(self, index: int, layer: LayerWeights) -> None:
        """Go through layer `index`, its weights in any scheme."""
        self.hidden = self._run(index, layer, ())

    @torch.inference_mode()
    def observe_head(self, final_norm: Tensor) -> InputStatistics:
        """What the head is given, once all layers are behind."""
        statistics, operations = InputStatistics(), self._selection(self._alone(0), 1).operations
        for hidden in self.hidden:
            statistics.add(operations.rms_norm(hidden, final_norm, self.config.rms_norm_eps))
        return statistics

    @torch.inference_mode()
    def _run(
        self, index: int, layer: LayerWeights, watched: Sequence[tuple[Weight, InputStatistics]]
    ) -> list[Tensor]:
        config = self._alone(index)
        longest = max(len(hidden) for hidden in self.hidden)
        selection = self._selection(config, longest)
        selection = replace(selection, linear=Watching(selection.linear, watched))
        # The head and the final norm are not run; a packed copy of the layer is the decoder's own.
        weights = Weights(
            self.hidden[0], [copy(layer)], layer.attention_norm, Weight(Scheme(), self.hidden[0])
        )
        decoder = Decoder(config, weights, selection, dtype=torch.float32, limits=_limits(longest))
        caches = decoder.new_caches(decoder.limits.blocks_per_seq)
        left = []
        for hidden in self.hidden:
            weights.embedding = hidden
            batch = whole_sequences([len(hidden)], BLOCK_SIZE, hidden.device)
            places = torch.arange(len(hidden), device=hidden.device)
            left.append(decoder.forward(places, places, batch, caches))
        return left

    def _alone(self, index: int) -> ModelConfig:
        """A decoder of layer `index` only."""
        windows = (self.config.windows[index],)
        return replace(self.config, num_layers=1, windows=windows, schemes=None, on_the_fly=None)

    def _selection(self, config: ModelConfig, longest: int) -> Any:
        specs = attention_specs(config, dtype=torch.float32, limits=_limits(longest))
        products = config.spec.weight_specs(torch.float32)
        return select("torch", device=self.device, specs=specs, weights=products, dtype=torch.float32)


def _limits(longest: int) -> StepLimits:
    return StepLimits(
        block_size=BLOCK_SIZE, max_len=longest, max_seqs=1, max_step_tokens=longest, prefill_chunk=longest
    )
