"""A one-layer head over a decoder's hidden states, as EAGLE-3 has it (Li et al. 2025, section 3.1).

Some of the target's hidden states of a token (low, middle and high layers) are fused into one. Beside the
embedding of the token after it, both normed, it goes through one decoder layer of twice the input. What comes
out predicts the token after that; and it stands for the hidden state of the next token for as long as the
target has not computed that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from backbench.backends.interface import Batch, Selection, Weight, WeightSpec
from backbench.engine.limits import StepLimits
from backbench.engine.models.config import ModelConfig, layer_spec, norm_spec, product_spec
from backbench.engine.models.decoder import Decoder, Wanted
from backbench.engine.models.layers import ModelSpec, Product, TensorSpec
from backbench.engine.models.weights import Weights


@dataclass(frozen=True, kw_only=True)
class Eagle3Config(ModelConfig):
    """The head's shape. `vocab_size` is the target's; `max_len`, what it was trained for, is no limit."""

    target_hidden_size: int
    target_layers: tuple[int, ...]
    """What enters these layers of the target is fused; the first is 0."""
    draft_vocab_size: int
    """Tokens that it can draft."""
    norm_before_residual: bool
    """The residual stream begins with the normed hidden state instead of the hidden state."""
    prefix: str
    """Of the layer's tensors in the checkpoint."""

    @cached_property
    def spec(self) -> ModelSpec:
        """As the base class; `fusion` and `hidden_norm` come on top."""
        size, embedding = self.hidden_size, (("embed_tokens.weight", self.vocab_size),)
        return ModelSpec(
            embedding=TensorSpec("embedding", (self.vocab_size, size), embedding),
            layers=(layer_spec(self, 0, self.prefix, 2 * size),),
            final_norm=norm_spec("final_norm", size, "norm"),
            head=product_spec(self, "head", {"lm_head": self.draft_vocab_size}, size),
            tied=False,
        )

    @cached_property
    def fusion(self) -> Product:
        """The target's hidden states, side by side, to one."""
        columns = len(self.target_layers) * self.target_hidden_size
        return product_spec(self, "fusion", {"fc": self.hidden_size}, columns)

    @cached_property
    def hidden_norm(self) -> TensorSpec:
        """Of the hidden state; `attention_norm` is that of the embedding."""
        return norm_spec("hidden_norm", self.hidden_size, f"{self.prefix}.hidden_norm")

    def weight_specs(self, dtype: torch.dtype) -> tuple[WeightSpec, ...]:
        """What a backend is asked to serve."""
        return (*self.spec.weight_specs(dtype), self.fusion.weight_spec(dtype))


@dataclass(frozen=True)
class Eagle3Weights:
    """What a checkpoint of a head holds, on the device."""

    decoder: Weights
    """The embedding is [0, H] where the checkpoint has none."""
    fusion: Weight
    """[H, layers * target H]"""
    hidden_norm: Tensor
    """[H]"""
    target_ids: Tensor | None
    """i64 [draft_vocab_size]: the target's id of each token; None = they are the target's."""

    @property
    def num_parameters(self) -> int:
        """Parameters in the checkpoint."""
        tensors = [*self.decoder.tensors(), *self.fusion.tensors(), self.hidden_norm]
        return sum(tensor.numel() for tensor in tensors)


class Eagle3Head(Decoder):
    """The head behind a backend. Its caches are the KV cache of its layer and, last, hidden states: for each
    slot of the KV pool what the head goes on from there, and one row more for padding, [slots + 1, H]."""

    config: Eagle3Config

    def __init__(
        self,
        config: Eagle3Config,
        weights: Eagle3Weights,
        selection: Selection,
        *,
        dtype: torch.dtype,
        limits: StepLimits,
    ) -> None:
        super().__init__(config, weights.decoder, selection, dtype=dtype, limits=limits)
        self.own_bytes = sum(each.nbytes for each in (*weights.fusion.tensors(), weights.hidden_norm))
        self.own_bytes += self.weights.num_bytes
        """Device bytes of its weights; an embedding that is the target's is not counted."""
        self._fusion = self._pack(weights.fusion)
        self._hidden_norm = weights.hidden_norm
        self._target_ids = weights.target_ids

    def share_embedding(self, target: Tensor) -> None:
        """Look tokens up in the target's embedding [V, H] where the checkpoint has none, or the same."""
        own = self.weights.embedding
        assert own is not None, "a head is no stage of one"
        if len(own) == 0 or torch.equal(own, target):
            self.own_bytes -= own.nbytes
            self.weights.embedding = target

    def new_caches(self, num_blocks: int) -> list[Any]:
        rows = num_blocks * self.limits.block_size + 1
        shape = rows, self.config.hidden_size
        states = torch.zeros(shape, dtype=self.dtype, device=self.device.torch_device)
        return [*super().new_caches(num_blocks), states]

    def cache_bytes_per_block(self) -> int:
        states = self.limits.block_size * self.config.hidden_size * self.dtype.itemsize
        return super().cache_bytes_per_block() + states

    def copy_blocks(self, caches: Sequence[Any], src: Tensor, dst: Tensor) -> None:
        super().copy_blocks(caches[:-1], src, dst)
        blocks = caches[-1][:-1].unflatten(0, (-1, self.limits.block_size))
        blocks.index_copy_(0, dst, blocks[src])

    @torch.inference_mode()
    def fuse(self, states: Sequence[Tensor]) -> Tensor:
        """The target's hidden states, [T, target H] of each of its `target_layers`, as one: [T, H]."""
        return self.linear.run(torch.cat(tuple(states), dim=-1), self._fusion)

    @torch.inference_mode()
    def advance(
        self,
        hidden: Tensor,
        ids: Tensor,
        positions: Tensor,
        batch: Batch,
        caches: Sequence[Any],
        wanted: Wanted | None = None,
    ) -> Tensor:
        """From the hidden states of tokens, [T, H], and the ids i64[T] of those after them: the hidden states
        of the latter, [T, H] before the final norm, or [N, H] of those `wanted`.

        positions: i64[T], of the former. `hidden` may be overwritten.
        """
        layer, eps = self.layers[0], self.config.rms_norm_eps
        embedded = self.operations.rms_norm(self._embed(ids), layer.weights.attention_norm, eps)
        normed = self.operations.rms_norm(hidden, self._hidden_norm, eps)
        residual = normed if self.config.norm_before_residual else hidden
        rows = torch.cat((embedded, normed), dim=-1)
        x, residual = self._run(layer, rows, residual, positions, batch, caches[0], wanted)
        return x + residual

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [S, V] over the target's vocabulary; -inf for what the head cannot draft."""
        logits = super().logits(hidden)
        if self._target_ids is None:
            return logits
        whole = logits.new_full((len(logits), self.config.vocab_size), -torch.inf)
        return whole.index_copy_(1, self._target_ids, logits)
