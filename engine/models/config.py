"""A decoder's shape, the layers it is made of, and the sizes that follow."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from backbench.backends.interface import kv_bytes_per_token
from backbench.engine.models.layers import (
    DENSE,
    LayerAttention,
    LayerSpec,
    ModelSpec,
    Product,
    Start,
    TensorSpec,
)
from backbench.engine.models.on_the_fly import OnTheFly, described
from backbench.engine.models.rope import RopeConfig
from backbench.engine.models.schemes import Schemes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What weights and computation may be in, by name."""


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's shape and the declared differences within the Llama family."""

    architecture: str
    """Name of its family; see `engine.models.families`."""
    vocab_size: int
    hidden_size: int
    num_layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    ffn_size: int
    rms_norm_eps: float
    rope: RopeConfig
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    """Per layer: a query sees this many latest keys, itself included; None = all."""
    max_len: int
    eos_token_ids: tuple[int, ...]
    dtype: torch.dtype
    """The checkpoint's own dtype."""
    schemes: Schemes | None = None
    """How the checkpoint keeps each linear; None = all dense."""
    on_the_fly: OnTheFly | None = None
    """What is done to the products while they are loaded."""

    @cached_property
    def spec(self) -> ModelSpec:
        """Every layer, product and tensor, and what they are called in a checkpoint."""
        vocab = (self.vocab_size, self.hidden_size)
        stored = ModelSpec(
            embedding=TensorSpec(
                "embedding", vocab, (("model.embed_tokens.weight", self.vocab_size),), 0, padded=True
            ),
            layers=tuple(
                layer_spec(self, index, f"model.layers.{index}", self.hidden_size)
                for index in range(self.num_layers)
            ),
            final_norm=norm_spec("final_norm", self.hidden_size, "model.norm"),
            head=self._head(),
            tied=self.tied_embeddings,
        )
        return stored if self.on_the_fly is None else self.on_the_fly.put_on(stored)

    @property
    def quantization(self) -> str | None:
        """How the products are kept, in a few words; None = all are dense."""
        return described(self.spec)

    def _head(self) -> Product:
        rows = {"lm_head": self.vocab_size}
        head = replace(product_spec(self, "head", rows, self.hidden_size), padded=True)
        return replace(head, scheme=DENSE) if self.tied_embeddings else head

    @property
    def qkv_size(self) -> int:
        """Output features of the fused query, key and value projection."""
        return (self.q_heads + 2 * self.kv_heads) * self.head_dim

    @property
    def linear_parameters(self) -> int:
        """Parameters of all matrix multiplications of one token, the output head included."""
        return self.spec.linear_parameters

    @property
    def num_parameters(self) -> int:
        """Parameters of the model; a tied embedding counts once."""
        return self.spec.num_parameters

    def weight_bytes(self, dtype: torch.dtype) -> int:
        """Bytes dense weights take in `dtype`; of loaded ones ask `Weights.num_bytes`."""
        return self.num_parameters * dtype.itemsize

    def streamed_weight_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of dense weights one step must read; of loaded ones ask `Weights.streamed_bytes`."""
        return (self.num_parameters - self.spec.looked_up_parameters) * dtype.itemsize

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes that one token's keys and values take in the caches of all layers, scales included."""
        return self.num_layers * kv_bytes_per_token(self.kv_heads, self.head_dim, dtype)

    def flops_per_token(self, context: int) -> int:
        """As `ModelSpec.flops_per_token`."""
        return self.spec.flops_per_token(context)


def layer_spec(config: ModelConfig, index: int, prefix: str, columns: int) -> LayerSpec:
    """Layer `index` in the layout of the Llama family, with what this model adds to it.

    prefix: of its tensors in a checkpoint. columns: input features of queries, keys and values.
    """
    hidden, head_dim, ffn_size = config.hidden_size, config.head_dim, config.ffn_size
    queries, keys = config.q_heads * head_dim, config.kv_heads * head_dim
    attention, ffn = f"{prefix}.self_attn", f"{prefix}.mlp"
    rows = {f"{attention}.q_proj": queries, f"{attention}.k_proj": keys, f"{attention}.v_proj": keys}
    biases = tuple((f"{name}.bias", size) for name, size in rows.items())
    heads = config.q_heads, config.kv_heads, config.kv_heads
    bias = TensorSpec("qkv_bias", (config.qkv_size,), biases, 0, units=heads)
    q_norm = norm_spec("q_norm", head_dim, f"{attention}.q_norm")
    k_norm = norm_spec("k_norm", head_dim, f"{attention}.k_norm")
    return LayerSpec(
        attention=LayerAttention(
            q_heads=config.q_heads,
            kv_heads=config.kv_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            softcap=None,
            window=config.windows[index],
            rope=config.rope,
        ),
        tensors=(
            norm_spec("attention_norm", hidden, f"{prefix}.input_layernorm"),
            replace(product_spec(config, "qkv", rows, columns), units=heads),
            *((bias,) if config.qkv_bias else ()),
            *((q_norm, k_norm) if config.qk_norm else ()),
            replace(
                product_spec(
                    config, "attention_output", {f"{attention}.o_proj": hidden}, queries, residual=True
                ),
                units=(config.q_heads,),
            ),
            norm_spec("ffn_norm", hidden, f"{prefix}.post_attention_layernorm"),
            product_spec(
                config, "gate_up", {f"{ffn}.gate_proj": ffn_size, f"{ffn}.up_proj": ffn_size}, hidden
            ),
            product_spec(config, "down", {f"{ffn}.down_proj": hidden}, ffn_size, residual=True),
        ),
    )


def norm_spec(role: str, size: int, name: str) -> TensorSpec:
    """A norm's weight; name: of its module in a checkpoint."""
    return TensorSpec(role, (size,), ((f"{name}.weight", size),), start=Start.ONES)


def product_spec(
    config: ModelConfig, role: str, rows_of: dict[str, int], columns: int, *, residual: bool = False
) -> Product:
    """Of the named linears' rows. One that is added to the residual stream is divided by input features,
    so that the two products of attention, and of the feed-forward, need one sum between devices.

    Source: Shoeybi et al. 2019 (Megatron-LM), section 3.
    """
    return Product(
        role,
        (sum(rows_of.values()), columns),
        tuple((f"{name}.weight", size) for name, size in rows_of.items()),
        shard_axis=1 if residual else 0,
        start=Start.RESIDUAL if residual else Start.NORMAL,
        scheme=DENSE if config.schemes is None else config.schemes.of_product(rows_of),
    )
