"""What a decoder is made of, tensor by tensor: weights, counts, products and later shards derive from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from backbench.backends.interface import Scheme, Weight, WeightSpec, join
from backbench.engine.models.rope import RopeConfig

DENSE = Scheme()


class Start(Enum):
    """How random weights fill a tensor."""

    ONES = "ones"
    NORMAL = "normal"
    RESIDUAL = "residual"
    """Normal, scaled down with depth, since the product is added to the residual stream."""


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

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()


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

    def weight_spec(self, dtype: torch.dtype, scheme: Scheme | None = None) -> WeightSpec:
        """What a backend is asked whether it can multiply by; scheme: None = the product's own."""
        return WeightSpec(self.role, self.n, self.k, scheme or self.scheme, dtype)

    def shard(self, weight: Weight, rank: int, world: int) -> Weight:
        """What device `rank` of `world` multiplies by: its share of each source's rows, or of the columns.

        Raises BackendError where they do not divide evenly, or the weight's scheme cannot be split.
        """
        if self.shard_axis == 1:
            return weight.shard(1, rank, world)
        ends = list(accumulate(rows for _, rows in self.sources))
        sources = [weight.rows(start, end) for start, end in zip([0, *ends], ends, strict=False)]
        return join([source.shard(0, rank, world) for source in sources])


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


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer: its attention, and its tensors in the order in which random ones are drawn."""

    attention: LayerAttention
    tensors: tuple[TensorSpec, ...]

    @property
    def products(self) -> tuple[Product, ...]:
        """The matrix multiplications, in the order they run."""
        return tuple(each for each in self.tensors if isinstance(each, Product))


@dataclass(frozen=True)
class ModelSpec:
    """A whole decoder."""

    embedding: TensorSpec
    layers: tuple[LayerSpec, ...]
    final_norm: TensorSpec
    head: Product
    tied: bool
    """The head is the embedding's own tensor, or made of it where its scheme is another."""

    def with_products(self, change: Callable[[Product], Product]) -> ModelSpec:
        """The decoder with every layer's products changed; the head is none of them."""
        layers = [
            replace(layer, tensors=tuple(change(t) if isinstance(t, Product) else t for t in layer.tensors))
            for layer in self.layers
        ]
        return replace(self, layers=tuple(layers))

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor the device holds, in the order in which random ones are drawn."""
        yield self.embedding
        for layer in self.layers:
            yield from layer.tensors
        yield self.final_norm
        if not self.tied:
            yield self.head

    @cached_property
    def products(self) -> tuple[Product, ...]:
        """Every matrix multiplication of one token, the head's last."""
        return (*(product for layer in self.layers for product in layer.products), self.head)

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
        return 0 if self.tied else self.embedding.parameters

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
