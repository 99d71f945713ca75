"""A decoder's weights on the device, in the canonical layout, from files or from random numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from backbench.backends.interface import Device, Linear, PackedWeight, Scheme, Weight
from backbench.engine.models.config import ModelConfig
from backbench.engine.models.layers import (
    ALL_LAYERS,
    WHOLE,
    ModelSpec,
    Product,
    Shard,
    Stage,
    Start,
    TensorSpec,
)
from backbench.engine.models.on_the_fly import round_product

RANDOM_STD = 0.02
RANDOM_SEED = 20240229


Held = Weight | PackedWeight
"""A product's weight: canonical as it was loaded, or as a backend packed it."""


@dataclass
class LayerWeights:
    """One layer's tensors by their roles (`LayerSpec`). Linears are [output features, input features]."""

    attention_norm: Tensor
    """[hidden_size]"""
    qkv: Held
    """[(q_heads + 2 * kv_heads) * head_dim, hidden_size]: queries, keys, values."""
    attention_output: Held
    """[hidden_size, q_heads * head_dim]"""
    ffn_norm: Tensor
    """[hidden_size]"""
    gate_up: Held
    """[2 * ffn_size, hidden_size]: gate, then up."""
    down: Held
    """[hidden_size, ffn_size]"""
    qkv_bias: Tensor | None = None
    q_norm: Tensor | None = None
    """[head_dim]"""
    k_norm: Tensor | None = None


@dataclass
class Weights:
    """All weights of one model, or of a stage of it. A tied dense `lm_head` is the embedding's own tensor."""

    embedding: Tensor | None
    """[vocab_size, hidden_size]; None = this is not the first stage."""
    layers: list[LayerWeights]
    final_norm: Tensor | None
    """[hidden_size]; None, as the head is, where this is not the last stage."""
    lm_head: Held | None
    """[vocab_size, hidden_size]"""

    def tensors(self, read: bool = False) -> Iterator[Tensor]:
        """Every distinct tensor; read: but for what only stands beside a backend's own form of it."""
        seen: set[int] = set()
        found: list[Tensor | Held | None] = [self.embedding, self.final_norm, self.lm_head]
        for layer in self.layers:
            found += vars(layer).values()
        for item in found:
            for tensor in item.tensors(read) if isinstance(item, Held) else (item,):
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
        read = sum(tensor.nbytes for tensor in self.tensors(read=True))
        if self.embedding is None:
            return read
        head = () if self.lm_head is None else self.lm_head.tensors(read=True)
        is_head = self.embedding.data_ptr() in {tensor.data_ptr() for tensor in head}
        return read - (0 if is_head else self.embedding.nbytes)

    def products(self) -> Iterator[tuple[str, Held]]:
        """(role, weight) of every product, the head's last."""
        for layer in self.layers:
            yield from ((role, held) for role, held in vars(layer).items() if isinstance(held, Held))
        if self.lm_head is not None:
            yield "head", self.lm_head

    def pack(self, linear: Linear, device: Device) -> None:
        """Have every quantized weight as `linear` packs it, one after the other: none is held twice for long.

        A dense one stays canonical: it is packed without a copy. What another implementation packed before
        stays so, too.
        """
        for layer in self.layers:
            for role, held in vars(layer).items():
                setattr(layer, role, _packed(held, linear, device))
        self.lm_head = _packed(self.lm_head, linear, device)


def _packed(held: Any, linear: Linear, device: Device) -> Any:
    if isinstance(held, Weight) and held.scheme != Scheme():
        return PackedWeight.of(linear, held, device)
    return held


Fill = Callable[[TensorSpec, str, Tensor], None]
"""Fills the part of a tensor that the checkpoint calls by this name, its whole rows."""


def filled(wanted: TensorSpec, device: torch.device, dtype: torch.dtype, fill: Fill) -> Tensor:
    """The tensor, allocated on the device and filled from each of its sources in turn."""
    whole = torch.empty(wanted.shape, device=device, dtype=dtype)
    rows = [size for _, size in wanted.sources]
    for (name, _), part in zip(wanted.sources, whole.split(rows), strict=True):
        fill(wanted, name, part)
    return whole


def build(
    spec: ModelSpec,
    device: torch.device,
    dtype: torch.dtype,
    fill: Fill,
    read: Callable[[Product], Weight] | None = None,
    shard: Shard = WHOLE,
) -> Weights:
    """Allocate every tensor on the device and have `fill` write it, one checkpoint tensor at a time.

    A product whose scheme is not dense is what `read` finds stored, on the device; without it, dense rows are
    rounded at once, so that they are held no longer.
    shard: what of each tensor is kept. A whole one is made first and then cut, so that random numbers, scales
    and checks are those of one device.
    """

    def tensor(wanted: TensorSpec) -> Tensor:
        return filled(wanted, device, dtype, fill)

    def source(wanted: Product, name: str, rows: int) -> Tensor:
        part = torch.empty((rows, wanted.k), device=device, dtype=dtype)
        fill(wanted, name, part)
        return part

    def whole(wanted: TensorSpec) -> Any:
        if not isinstance(wanted, Product):
            return tensor(wanted)
        if wanted.scheme == Scheme():
            return Weight(Scheme(), tensor(wanted))
        if read is not None:
            return read(wanted)
        return round_product(wanted, (source(wanted, name, rows) for name, rows in wanted.sources))

    def canonical(wanted: TensorSpec) -> Any:
        return wanted.shard(whole(wanted), *shard)

    embedding: Tensor | None = None
    lm_head: Weight | None = None
    tied_head = spec.last and spec.tied
    if spec.first or tied_head:
        table = tensor(spec.embedding)
        if tied_head and spec.head.scheme != Scheme():
            lm_head = spec.head.shard(round_product(spec.head, iter([table])), *shard)
        table = spec.embedding.shard(table, *shard)
        if tied_head and lm_head is None:
            lm_head = Weight(Scheme(), table)
        embedding = table if spec.first else None
        del table
    layers = [LayerWeights(**{each.role: canonical(each) for each in layer.tensors}) for layer in spec.layers]
    final_norm = tensor(spec.final_norm) if spec.last else None
    if spec.last and lm_head is None:
        lm_head = canonical(spec.head)
    return Weights(embedding, layers, final_norm, lm_head)


def random_weights(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    shard: Shard = WHOLE,
    stage: Stage = ALL_LAYERS,
) -> Weights:
    """Random normal weights from a fixed seed, generated on the device; norms are 1.

    What adds to the residual stream is scaled down by sqrt(2 * layers), so that its variance stays
    about constant with depth (Radford et al. 2019, section 2.3). A stage's numbers are those of the whole
    model: what other stages hold is drawn as well, one tensor after the other, and dropped.
    """
    generator = torch.Generator(device).manual_seed(RANDOM_SEED)
    deviations = {
        Start.NORMAL: RANDOM_STD,
        Start.RESIDUAL: RANDOM_STD / (2 * config.num_layers) ** 0.5,
    }

    coming = iter([(each, *source) for each in config.spec.tensors() for source in each.sources])

    def draw(wanted: TensorSpec, part: Tensor) -> None:
        if wanted.start is Start.ONES:
            part.fill_(1.0)
        else:
            part.normal_(0.0, deviations[wanted.start], generator=generator)

    def fill(wanted: TensorSpec, name: str, part: Tensor) -> None:
        for other, before, rows in coming:
            if before == name:
                break
            draw(other, torch.empty((rows, *other.shape[1:]), device=device, dtype=dtype))
        draw(wanted, part)

    return build(config.spec.stage(stage), device, dtype, fill, shard=shard)
