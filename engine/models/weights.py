"""A decoder's weights on the device, in the canonical layout, from files or from random numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from backbench.backends.interface import Scheme, Weight
from backbench.engine.models.config import ModelConfig
from backbench.engine.models.layers import ModelSpec, Product, Start, TensorSpec

RANDOM_STD = 0.02
RANDOM_SEED = 20240229


@dataclass
class LayerWeights:
    """One layer's tensors by their roles (`LayerSpec`). Linears are [output features, input features]."""

    attention_norm: Tensor
    """[hidden_size]"""
    qkv: Weight
    """[(q_heads + 2 * kv_heads) * head_dim, hidden_size]: queries, keys, values."""
    attention_output: Weight
    """[hidden_size, q_heads * head_dim]"""
    ffn_norm: Tensor
    """[hidden_size]"""
    gate_up: Weight
    """[2 * ffn_size, hidden_size]: gate, then up."""
    down: Weight
    """[hidden_size, ffn_size]"""
    qkv_bias: Tensor | None = None
    q_norm: Tensor | None = None
    """[head_dim]"""
    k_norm: Tensor | None = None


@dataclass
class Weights:
    """All weights of one model. A tied `lm_head` is the embedding's own tensor."""

    embedding: Tensor
    """[vocab_size, hidden_size]"""
    layers: list[LayerWeights]
    final_norm: Tensor
    """[hidden_size]"""
    lm_head: Weight
    """[vocab_size, hidden_size]"""

    def tensors(self) -> Iterator[Tensor]:
        """Every distinct tensor."""
        seen: set[int] = set()
        found: list[Tensor | Weight | None] = [self.embedding, self.final_norm, self.lm_head]
        for layer in self.layers:
            found += vars(layer).values()
        for item in found:
            for tensor in item.tensors() if isinstance(item, Weight) else (item,):
                if tensor is not None and tensor.data_ptr() not in seen:
                    seen.add(tensor.data_ptr())
                    yield tensor

    @property
    def num_bytes(self) -> int:
        """Device bytes of all weights."""
        return sum(tensor.nbytes for tensor in self.tensors())

    @property
    def streamed_bytes(self) -> int:
        """Device bytes one step must read: an embedding that is not the head as well is only looked up."""
        tied = self.lm_head.q.data_ptr() == self.embedding.data_ptr()
        return self.num_bytes - (0 if tied else self.embedding.nbytes)


Fill = Callable[[TensorSpec, str, Tensor], None]
"""Fills the part of a tensor that the checkpoint calls by this name, its whole rows."""


def build(
    spec: ModelSpec,
    device: torch.device,
    dtype: torch.dtype,
    fill: Fill,
    quantized: Callable[[Product], Weight] | None = None,
) -> Weights:
    """Allocate every tensor on the device and have `fill` write it, one checkpoint tensor at a time.

    quantized: what loads a product whose scheme is not dense, on the device.
    """

    def tensor(wanted: TensorSpec) -> Tensor:
        whole = torch.empty(wanted.shape, device=device, dtype=dtype)
        rows = [size for _, size in wanted.sources]
        for (name, _), part in zip(wanted.sources, whole.split(rows), strict=True):
            fill(wanted, name, part)
        return whole

    def product(wanted: Product) -> Weight:
        if wanted.scheme.dense:
            return Weight(wanted.scheme, tensor(wanted))
        assert quantized is not None, wanted.role
        return quantized(wanted)

    def canonical(wanted: TensorSpec) -> Any:
        return product(wanted) if isinstance(wanted, Product) else tensor(wanted)

    embedding = tensor(spec.embedding)
    layers = [LayerWeights(**{each.role: canonical(each) for each in layer.tensors}) for layer in spec.layers]
    final_norm = tensor(spec.final_norm)
    lm_head = Weight(Scheme(), embedding) if spec.tied else product(spec.head)
    return Weights(embedding, layers, final_norm, lm_head)


def random_weights(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Weights:
    """Random normal weights from a fixed seed, generated on the device; norms are 1.

    What adds to the residual stream is scaled down by sqrt(2 * layers), so that its variance stays
    about constant with depth (Radford et al. 2019, section 2.3).
    """
    generator = torch.Generator(device).manual_seed(RANDOM_SEED)
    deviations = {
        Start.NORMAL: RANDOM_STD,
        Start.RESIDUAL: RANDOM_STD / (2 * config.num_layers) ** 0.5,
    }

    def fill(wanted: TensorSpec, name: str, part: Tensor) -> None:
        if wanted.start is Start.ONES:
            part.fill_(1.0)
        else:
            part.normal_(0.0, deviations[wanted.start], generator=generator)

    return build(config.spec, device, dtype, fill)
