"""A decoder's weights on the device, in the canonical layout, from files or from random numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from backbench.backends.interface import Scheme, Weight
from backbench.engine.models.config import ModelConfig

RANDOM_STD = 0.02
RANDOM_SEED = 20240229


@dataclass
class LayerWeights:
    """One layer. Linears are [output features, input features]."""

    attention_norm: Tensor
    """[hidden_size]"""
    qkv: Weight
    """[(q_heads + 2 * kv_heads) * head_dim, hidden_size]: queries, keys, values."""
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    """[head_dim]"""
    k_norm: Tensor | None
    output: Weight
    """[hidden_size, q_heads * head_dim]"""
    ffn_norm: Tensor
    """[hidden_size]"""
    gate_up: Weight
    """[2 * ffn_size, hidden_size]: gate, then up."""
    down: Weight
    """[hidden_size, ffn_size]"""


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
            for tensor in (item.q, item.scale, item.zero) if isinstance(item, Weight) else (item,):
                if tensor is not None and tensor.data_ptr() not in seen:
                    seen.add(tensor.data_ptr())
                    yield tensor

    @property
    def num_bytes(self) -> int:
        """Device bytes of all weights."""
        return sum(tensor.nbytes for tensor in self.tensors())


Fill = Callable[[str, Tensor], None]
"""Fills a tensor (possibly a slice of a fused one) with the checkpoint's tensor of that name."""


def build(config: ModelConfig, device: torch.device, dtype: torch.dtype, fill: Fill) -> Weights:
    """Allocate every tensor on the device and have `fill` write it, one checkpoint tensor at a time."""

    def fused(rows_of: dict[str, int], *columns: int) -> Tensor:
        tensor = torch.empty(sum(rows_of.values()), *columns, device=device, dtype=dtype)
        for name, part in zip(rows_of, tensor.split(list(rows_of.values())), strict=True):
            fill(name, part)
        return tensor

    def single(name: str, *shape: int) -> Tensor:
        return fused({name: shape[0]}, *shape[1:])

    def linear(rows_of: dict[str, int], columns: int) -> Weight:
        return Weight(Scheme(), fused(rows_of, columns))

    hidden, queries = config.hidden_size, config.q_heads * config.head_dim
    keys = config.kv_heads * config.head_dim

    def layer(prefix: str) -> LayerWeights:
        attention, ffn = f"{prefix}.self_attn", f"{prefix}.mlp"
        rows = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
        biases = {f"{attention}.{name}.bias": size for name, size in rows.items()}
        gate_up = {f"{ffn}.gate_proj.weight": config.ffn_size, f"{ffn}.up_proj.weight": config.ffn_size}
        return LayerWeights(
            attention_norm=single(f"{prefix}.input_layernorm.weight", hidden),
            qkv=linear({f"{attention}.{name}.weight": size for name, size in rows.items()}, hidden),
            qkv_bias=fused(biases) if config.qkv_bias else None,
            q_norm=single(f"{attention}.q_norm.weight", config.head_dim) if config.qk_norm else None,
            k_norm=single(f"{attention}.k_norm.weight", config.head_dim) if config.qk_norm else None,
            output=linear({f"{attention}.o_proj.weight": hidden}, queries),
            ffn_norm=single(f"{prefix}.post_attention_layernorm.weight", hidden),
            gate_up=linear(gate_up, hidden),
            down=linear({f"{ffn}.down_proj.weight": hidden}, config.ffn_size),
        )

    embedding = single("model.embed_tokens.weight", config.vocab_size, hidden)
    layers = [layer(f"model.layers.{index}") for index in range(config.num_layers)]
    final_norm = single("model.norm.weight", hidden)
    if config.tied_embeddings:
        lm_head = Weight(Scheme(), embedding)
    else:
        lm_head = linear({"lm_head.weight": config.vocab_size}, hidden)
    return Weights(embedding, layers, final_norm, lm_head)


def random_weights(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Weights:
    """Random normal weights from a fixed seed, generated on the device; norms are 1.

    What adds to the residual stream is scaled down by sqrt(2 * layers), so that its variance stays
    about constant with depth (Radford et al. 2019, section 2.3).
    """
    generator = torch.Generator(device).manual_seed(RANDOM_SEED)
    residual_std = RANDOM_STD / (2 * config.num_layers) ** 0.5

    def fill(name: str, target: Tensor) -> None:
        if name.endswith("norm.weight"):
            target.fill_(1.0)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            target.normal_(0.0, residual_std, generator=generator)
        else:
            target.normal_(0.0, RANDOM_STD, generator=generator)

    return build(config, device, dtype, fill)
