"""What a decoder is made of, tensor by tensor: weights, counts, products and shards derive from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from backbench.backends.interface import Scheme, Weight, WeightSpec, join
from backbench.engine.models.rope import RopeConfig
from backbench.errors import BackendError

DENSE = Scheme()


class Start(Enum):
    """How random weights fill a tensor."""

    ONES = "ones"
    NORMAL = "normal"
    RESIDUAL = "residual"
    """Normal, scaled down with depth, since the product is added to the residual stream."""


class Shard(NamedTuple):
    """Which part of a model one of several devices holds."""

    rank: int = 0
    world: int = 1


class Stage(NamedTuple):
    """Which part of a model's layers one of several devices holds, counted from the embedding on."""

    number: int = 0
    stages: int = 1


WHOLE = Shard()
ALL_LAYERS = Stage()
PADDED_ROWS = 64
"""Rows of a vocabulary that devices divide come in multiples of this."""
Held = TypeVar("Held", Tensor, Weight)


@dataclass(frozen=True)
class TensorSpec:
    """One tensor on the device, and the checkpoint's tensors whose rows it joins."""

    role: str
    """What it is for: the name of the field that holds it, as "qkv" of `LayerWeights`."""
    shape: tuple[int, ...]
    sources: tuple[tuple[str, int], ...]
    """(name in the checkpoint, rows), in order."""
    shard_axis: int | None = None
    """The axis on which several devices divide each source's rows or columns; None = each has all."""
    start: Start = Start.NORMAL
    units: tuple[int, ...] | None = None
    """Of each source, along the shard axis: how many parts (heads) stay whole. Devices have equal shares of
    them; where there are fewer parts than devices, several have the same one. None = single rows."""
    padded: bool = False
    """A vocabulary, whose rows need not divide: the last devices' shares end in zeros."""

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()

    def divided(self, world: int) -> Self:
        """What each of `world` devices holds of it.

        Raises BackendError where it cannot be divided among so many.
        """
        if world == 1 or self.shard_axis is None:
            return self
        if self.shard_axis == 1:
            columns = self._share(0, self.shape[1], Shard(0, world))
            return replace(self, shape=(self.shape[0], len(columns)), units=None)
        sources = tuple(
            (name, len(self._share(index, rows, Shard(0, world))))
            for index, (name, rows) in enumerate(self.sources)
        )
        rows = sum(rows for _, rows in sources)
        return replace(self, shape=(rows, *self.shape[1:]), sources=sources, units=None, padded=False)

    def shard(self, held: Held, rank: int, world: int) -> Held:
        """What device `rank` of `world` holds of the whole tensor, in memory of its own: its share of each
        source's rows, or of the columns.

        Raises BackendError where they do not divide evenly, or the weight's scheme cannot be split.
        """
        if world == 1 or self.shard_axis is None:
            return held
        weight = held if isinstance(held, Weight) else Weight(DENSE, held)
        part = _compact(self._part(weight, Shard(rank, world)))
        return part if isinstance(held, Weight) else part.q

    def _part(self, weight: Weight, shard: Shard) -> Weight:
        if self.shard_axis == 1:
            columns = self._share(0, weight.k, shard)
            return weight.columns(columns.start, columns.stop)
        parts, end = [], 0
        for index, (_, rows) in enumerate(self.sources):
            source = weight.rows(end, end + rows)
            share = self._share(index, rows, shard)
            parts.append(_padded_rows(source, share) if self.padded else source.rows(share.start, share.stop))
            end += rows
        return join(parts)

    def _share(self, index: int, size: int, shard: Shard) -> range:
        """Rows or columns of source `index`, which has `size`, that a device holds."""
        rank, world = shard
        if self.padded:
            each = -(-size // world)
            each += -each % max(PADDED_ROWS, self._block)
            return range(rank * each, (rank + 1) * each)
        units = size if self.units is None else self.units[index]
        if units % world == 0:
            each = size // world
            first = rank * each
        elif self.units is not None and world % units == 0:
            each = size // units
            first = rank * units // world * each
        else:
            what = self.sources[index][0].removesuffix(".weight")
            raise BackendError(f"{what}, of {units} parts, cannot be split into {world}; use another --tp.")
        if each % self._block:
            what = self.sources[index][0].removesuffix(".weight")
            raise BackendError(
                f"{what} cannot be split into {world}: {each} are no whole groups of {self._block} that stay "
                "together; use a smaller --tp."
            )
        return range(first, first + each)

    @property
    def _block(self) -> int:
        """Rows or columns along the shard axis that cannot be parted."""
        return 1


def _padded_rows(weight: Weight, share: range) -> Weight:
    """Rows `share` of a weight that may end before they do; what is missing is zeros."""
    size, missing = weight.scheme.group_n, share.stop - max(share.start, min(weight.n, share.stop))
    start = share.start if share.start < weight.n else 0
    part = weight.rows(start, min(share.stop, weight.n) if share.start < weight.n else 0)
    if missing == 0:
        return part

    def longer(tensor: Tensor | None, rows: int) -> Tensor | None:
        if tensor is None:
            return None
        whole = torch.zeros((rows, *tensor.shape[1:]), dtype=tensor.dtype, device=tensor.device)
        whole[: len(tensor)] = tensor
        return whole

    rows, blocks = len(share), -(-len(share) // size)
    q = longer(part.q, rows)
    assert q is not None
    return replace(
        part,
        q=q,
        scale=longer(part.scale, blocks),
        zero=longer(part.zero, blocks),
        row_scale=longer(part.row_scale, rows),
        positions=longer(part.positions, rows),
    )


def _compact(weight: Weight) -> Weight:
    """The same weight, no tensor of which keeps a larger one alive."""

    def own(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or (
            tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize
        ):
            return tensor
        return tensor.clone(memory_format=torch.contiguous_format)

    q = own(weight.q)
    assert q is not None
    return replace(
        weight,
        q=q,
        scale=own(weight.scale),
        zero=own(weight.zero),
        row_scale=own(weight.row_scale),
        positions=own(weight.positions),
    )


@dataclass(frozen=True)
class Product(TensorSpec):
    """A weight [n, k] that rows of k features are multiplied by: n output features by k input features."""

    scheme: Scheme = DENSE
    """How the weight is kept on the device."""
    input_norms: Tensor | None = field(default=None, compare=False, repr=False)
    """f32 [k]: the norm of each input feature over calibration rows, where the weight is pruned by it."""

    @property
    def n(self) -> int:
        """Output features."""
        return self.shape[0]

    @property
    def k(self) -> int:
        """Input features."""
        return self.shape[1]

    @property
    def _block(self) -> int:
        if self.shard_axis == 0:
            return self.scheme.group_n
        return self.scheme.columns_together

    def weight_spec(self, dtype: torch.dtype, scheme: Scheme | None = None) -> WeightSpec:
        """What a backend is asked whether it can multiply by; scheme: None = the product's own."""
        return WeightSpec(self.role, self.n, self.k, scheme or self.scheme, dtype)


@dataclass(frozen=True)
class LayerAttention:
    """What attention computes in one layer, whatever serves it."""

    q_heads: int
    kv_heads: int
    head_dim: int
    scale: float
    softcap: float | None
    window: int | None
    """A query sees this many latest keys, itself included; None = all."""
    rope: RopeConfig

    def flops(self, context: int) -> int:
        """Of one query over `context` keys: two per multiply-add of scores and weighted sum."""
        return 4 * self.q_heads * self.head_dim * min(context, self.window or context)

    def divided(self, world: int) -> LayerAttention:
        """What each of `world` devices attends to: its own query heads, and their key and value heads.

        Raises BackendError where the heads cannot be divided among so many.
        """
        q_heads, kv_heads = self.q_heads, self.kv_heads
        if q_heads % world or (kv_heads % world and world % kv_heads):
            raise BackendError(
                f"{q_heads} query heads and {kv_heads} KV heads cannot be divided among {world} devices; "
                "use another --tp."
            )
        return replace(self, q_heads=q_heads // world, kv_heads=max(kv_heads // world, 1))


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer: its attention, and its tensors in the order in which random ones are drawn."""

    attention: LayerAttention
    tensors: tuple[TensorSpec, ...]

    @property
    def products(self) -> tuple[Product, ...]:
        """The matrix multiplications, in the order they run."""
        return tuple(each for each in self.tensors if isinstance(each, Product))

    def divided(self, world: int) -> LayerSpec:
        """What each of `world` devices holds and computes of it."""
        return LayerSpec(self.attention.divided(world), tuple(each.divided(world) for each in self.tensors))


@dataclass(frozen=True)
class ModelSpec:
    """A whole decoder, or a stage of one: some of its layers, one after the other."""

    embedding: TensorSpec
    layers: tuple[LayerSpec, ...]
    final_norm: TensorSpec
    head: Product
    tied: bool
    """The head is the embedding's own tensor, or made of it where its scheme is another."""
    first: bool = True
    """It begins with the embedding; else with the hidden states that another stage has left."""
    last: bool = True
    """It ends with the final norm and the head; else it leaves hidden states to another stage."""

    def stage_layers(self, count: int) -> list[range]:
        """The layers of each of `count` stages, contiguous: as even as whole layers allow in the weights a
        token is multiplied by, the head's among them.

        Raises BackendError where there are fewer layers than stages.
        """
        if count > len(self.layers):
            raise BackendError(
                f"{len(self.layers)} layers cannot be divided among {count} stages; use a lower --pp."
            )
        sizes = [sum(product.parameters for product in layer.products) for layer in self.layers]
        share = (sum(sizes) + self.head.parameters) / count
        ends, passed = [0], 0.0
        for number in range(1, count):
            end, most = ends[-1], len(sizes) - (count - number)
            # Whole layers up to the one whose greater part lies beyond the stage's share.
            while end < most and (end == ends[-1] or passed + sizes[end] / 2 <= number * share):
                passed += sizes[end]
                end += 1
            ends.append(end)
        return [range(start, end) for start, end in pairwise([*ends, len(sizes)])]

    def stage(self, stage: Stage) -> ModelSpec:
        """What one of several devices that divide the layers holds and computes.

        Raises BackendError where there are fewer layers than stages.
        """
        if stage.stages == 1:
            return self
        layers = self.stage_layers(stage.stages)[stage.number]
        return replace(
            self,
            layers=self.layers[layers.start : layers.stop],
            first=stage.number == 0,
            last=stage.number == stage.stages - 1,
        )

    def divided(self, world: int) -> ModelSpec:
        """What each of `world` devices holds and computes; all have parts of one shape.

        Raises BackendError where it cannot be divided among so many.
        """
        if world == 1:
            return self
        return replace(
            self,
            embedding=self.embedding.divided(world),
            layers=tuple(layer.divided(world) for layer in self.layers),
            head=self.head.divided(world),
        )

    def with_products(self, change: Callable[[Product], Product]) -> ModelSpec:
        """The decoder with every layer's products changed; the head is none of them."""
        layers = [
            replace(layer, tensors=tuple(change(t) if isinstance(t, Product) else t for t in layer.tensors))
            for layer in self.layers
        ]
        return replace(self, layers=tuple(layers))

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor the device holds, in the order in which random ones are drawn."""
        if self.first or (self.last and self.tied):
            yield self.embedding
        for layer in self.layers:
            yield from layer.tensors
        if self.last:
            yield self.final_norm
            if not self.tied:
                yield self.head

    @cached_property
    def products(self) -> tuple[Product, ...]:
        """Every matrix multiplication of one token, the head's last."""
        products = tuple(product for layer in self.layers for product in layer.products)
        return (*products, self.head) if self.last else products

    @cached_property
    def num_parameters(self) -> int:
        """Parameters of the model; a tied embedding counts once."""
        return sum(tensor.parameters for tensor in self.tensors())

    @cached_property
    def linear_parameters(self) -> int:
        """Parameters of all products."""
        return sum(product.parameters for product in self.products)

    @property
    def looked_up_parameters(self) -> int:
        """Parameters a step does not read whole: those of an embedding that is not the head as well."""
        return self.embedding.parameters if self.first and not (self.last and self.tied) else 0

    def flops_per_token(self, context: int) -> int:
        """Floating-point operations to compute one token that attends to `context` keys, logits included.

        Two per multiply-add: 2 * parameters of the products, and 4 * heads * head_dim per key and layer
        (scores and weighted sum).
        """
        return 2 * self.linear_parameters + sum(layer.attention.flops(context) for layer in self.layers)

    def product_shapes(self) -> dict[str, tuple[int, int]]:
        """Role -> [n, k] of every product, those that layers share once.

        Layers of one model have products of one shape a role.
        """
        return {product.role: (product.n, product.k) for product in self.products}

    def weight_specs(self, dtype: torch.dtype) -> tuple[WeightSpec, ...]:
        """What a backend is asked to serve: every product once."""
        return tuple(dict.fromkeys(product.weight_spec(dtype) for product in self.products))
