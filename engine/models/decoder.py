"""The Llama family's forward pass over a paged cache, with every operation served by a backend."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from backbench.backends.interface import (
    AttentionRunner,
    AttentionSpec,
    Batch,
    Communicator,
    GraphSupport,
    PackedWeight,
    Peers,
    Rotation,
    RoundedRows,
    Selection,
    Single,
)
from backbench.backends.quantization import name_of
from backbench.engine.limits import StepLimits
from backbench.engine.models.config import ModelConfig
from backbench.engine.models.layers import ALL_LAYERS, Stage
from backbench.engine.models.rope import rotary_table
from backbench.engine.models.weights import Held, LayerWeights, Weights
from backbench.errors import BackendError

Rows = Tensor | RoundedRows
"""Rows of a product: numbers, or codes where what makes them has rounded them for it."""


def attention_specs(
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    limits: StepLimits,
    kv_dtype: torch.dtype | None = None,
    world: int = 1,
) -> list[AttentionSpec]:
    """Each layer's attention spec on one of `world` devices; layers that agree have equal ones.

    kv_dtype: None = `dtype`.
    """
    return [
        AttentionSpec(
            q_heads=layer.q_heads,
            kv_heads=layer.kv_heads,
            head_dim=layer.head_dim,
            dtype=dtype,
            kv_dtype=kv_dtype or dtype,
            block_size=limits.block_size,
            scale=layer.scale,
            # A window that covers the longest sequence hides nothing.
            window=layer.window if layer.window is not None and layer.window < limits.max_len else None,
            softcap=layer.softcap,
            max_seqs=limits.max_seqs,
            max_tokens=limits.max_batch_tokens,
            max_len=limits.max_len,
        )
        for layer in (each.attention for each in config.spec.divided(world).layers)
    ]


@dataclass(frozen=True)
class Layer:
    """One layer, ready to run: its weights, its packed linears, its attention."""

    weights: LayerWeights
    spec: AttentionSpec
    runner: AttentionRunner
    rotation: Rotation
    qkv: Any
    attention_output: Any
    gate_up: Any
    down: Any


@dataclass(frozen=True)
class Wanted:
    """The tokens of a step whose hidden states are asked for; the last layer computes no others."""

    tokens: Tensor
    """Their places in the step, i64[N]."""
    batch: Batch
    """The same tokens, each as the decode of its sequence."""

    @classmethod
    def of(cls, batch: Batch, tokens: Tensor, seqs: Tensor) -> Wanted:
        """The last tokens of sequences `seqs` i64[N] of `batch`, which lie at `tokens` i64[N] of the step."""
        count = len(tokens)
        decodes = Batch(
            query_start=torch.arange(count + 1, dtype=torch.int32, device=tokens.device),
            seq_lens=batch.seq_lens[seqs],
            block_table=batch.block_table[seqs],
            slots=batch.slots[tokens],
            num_seqs=count,
            num_tokens=count,
            num_decodes=count,
            max_query=1,
            max_len=batch.max_len,
        )
        return cls(tokens, decodes)


class Tap(Protocol):
    """Is given hidden states of every token that a decoder computes."""

    layers: tuple[int, ...]
    """It is given what enters each of these layers (the first is 0), the residual stream before the norm."""

    def keep(self, states: Sequence[Tensor], slots: Tensor) -> None:
        """states: [T, H] for each of `layers`, in order; slots: i64[T], of the tokens' keys and values, -1 =
        padding. Must not wait for the device, so that it can be captured."""


class Decoder:
    """One model behind one backend selection. Holds no request state; caches are passed in.

    T = tokens in the batch, S = rows sampled, H = hidden size, V = vocabulary size. `forward` and
    `logits` never wait for the device unless the backend does, so they can be captured in a graph
    where `graph_support` allows it.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        selection: Selection,
        *,
        dtype: torch.dtype,
        limits: StepLimits,
        kv_dtype: torch.dtype | None = None,
        communicator: Communicator | None = None,
        stage: Stage = ALL_LAYERS,
        tap: Tap | None = None,
    ) -> None:
        """kv_dtype: of the KV cache; None = `dtype`. communicator: None = this device has whole layers.
        stage: which of the layers. tap: of the hidden states of an engine's steps; None = nobody asks."""
        self.config = config
        self.communicator = communicator or Single(Peers(0, 1, selection.device))
        self.spec = config.spec.divided(self.communicator.world).stage(stage)
        """What this device holds and computes of the model."""
        self.own_layers = config.spec.stage_layers(stage.stages)[stage.number]
        """Which of the model's layers."""
        self.weights = weights
        self.device = selection.device
        self.dtype = dtype
        self.kv_dtype = kv_dtype or dtype
        self.limits = limits
        self.operations = selection.operations
        self.linear = selection.linear
        self._require_served()
        weights.pack(self.linear, self.device)
        rotary = rotary_table(config.rope, config.head_dim, self.device.torch_device, limits.max_len)
        world = self.communicator.world
        specs = attention_specs(config, dtype=dtype, limits=limits, kv_dtype=kv_dtype, world=world)
        # Those of other stages' layers, too: all stages then capture and plan the same steps.
        self.runners = {spec: selection.attention.open(spec, self.device) for spec in dict.fromkeys(specs)}
        self.layers = [
            Layer(
                weights=layer,
                spec=spec,
                runner=self.runners[spec],
                rotation=Rotation(rotary, layer.q_norm, layer.k_norm, config.rms_norm_eps),
                **{each.role: self._pack(getattr(layer, each.role)) for each in described.products},
            )
            for layer, spec, described in zip(
                weights.layers, [specs[index] for index in self.own_layers], self.spec.layers, strict=True
            )
        ]
        self.lm_head = None if weights.lm_head is None else self._pack(weights.lm_head)
        self.tap = tap

    @property
    def num_layers(self) -> int:
        """Layers."""
        return len(self.layers)

    @property
    def graph_support(self) -> GraphSupport:
        """Which batches may be captured: what every layer's attention allows."""
        return min(runner.graph for runner in self.runners.values())

    @property
    def few_queries(self) -> int:
        """Tokens of a sequence with drafts that every layer's attention computes like one."""
        return min((runner.few_queries for runner in self.runners.values()), default=1)

    def new_caches(self, num_blocks: int) -> list[Any]:
        """Every layer's KV cache of `num_blocks` blocks."""
        return [layer.runner.new_cache(num_blocks) for layer in self.layers]

    def new_hidden(self, num_tokens: int) -> Tensor:
        """Room for hidden states [num_tokens, H] between two stages."""
        shape = (num_tokens, self.config.hidden_size)
        return torch.zeros(shape, dtype=self.dtype, device=self.device.torch_device)

    def cache_bytes_per_block(self) -> int:
        """Device bytes one block takes over all layers."""
        return sum(layer.runner.cache_bytes_per_block() for layer in self.layers)

    def plan(self, batch: Batch) -> Hashable:
        """Every host integer that the launches for `batch` bake in: the key of a captured graph."""
        return tuple(runner.plan(batch) for runner in self.runners.values())

    def copy_blocks(self, caches: Sequence[Any], src: Tensor, dst: Tensor) -> None:
        """Copy blocks src[i] -> dst[i] (i64 device tensors) in every layer."""
        for layer, cache in zip(self.layers, caches, strict=True):
            layer.runner.copy_blocks(cache, src, dst)

    @torch.inference_mode()
    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        batch: Batch,
        caches: Sequence[Any],
        wanted: Wanted | None = None,
        entering: Tensor | None = None,
        tap: Tap | None = None,
    ) -> Tensor:
        """Hidden states [T, H] that the layers leave, for ids and positions i64[T]; [N, H] of those `wanted`.

        entering: [T, H], what the stage before left in place of embedded ids; None = this is the first stage.
        Writes every token's keys and values into `caches`. Rows of padding hold anything. tap: is given
        hidden states of all tokens; the engine's steps pass the decoder's own.
        """
        residual = x = self._embed(ids) if entering is None else entering
        first = self.weights.layers[0].attention_norm
        normed: Rows = self.operations.rms_norm(residual, first, self.config.rms_norm_eps)
        tapped: dict[int, Tensor] = {}
        for index, (layer, cache) in enumerate(zip(self.layers, caches, strict=True)):
            if index > 0:
                normed, residual = self._add_norm(x, residual, layer.weights.attention_norm, layer.qkv)
            if tap is not None and index in tap.layers:
                tapped[index] = residual.clone()  # what comes next may overwrite it
            # No later layer reads what the other tokens would become.
            asked = wanted if index == len(self.layers) - 1 else None
            x, residual = self._run(layer, normed, residual, positions, batch, cache, asked)
        if tap is not None:
            tap.keep([tapped[index] for index in tap.layers], batch.slots)
        return x + residual

    def _run(
        self,
        layer: Layer,
        normed: Rows,
        residual: Tensor,
        positions: Tensor,
        batch: Batch,
        cache: Any,
        wanted: Wanted | None,
    ) -> tuple[Tensor, Tensor]:
        """What one layer adds to the residual stream, and the stream: [T, H], or [N, H] of those `wanted`.

        normed: rows of its queries, keys and values, which are written into `cache`.
        """
        q = self._write(layer, normed, positions, batch, cache)
        if wanted is not None:
            q, residual, batch = q[wanted.tokens], residual[wanted.tokens], wanted.batch
            if batch.num_seqs == 0:
                return residual, residual
        out = torch.empty_like(q)
        layer.runner.run(q, cache, batch, out)
        x = self._summed(self.linear.run(out.flatten(1), layer.attention_output))
        normed, residual = self._add_norm(x, residual, layer.weights.ffn_norm, layer.gate_up)
        gated = self._gate(self._product(normed, layer.gate_up), layer.down)
        return self._summed(self._product(gated, layer.down)), residual

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [S, V], in the model's dtype, of rows [S, H] of what `forward` returned."""
        final_norm = self.weights.final_norm
        assert final_norm is not None, "only the last stage has logits"
        normed = self.operations.rms_norm(hidden, final_norm, self.config.rms_norm_eps)
        logits = self.linear.run(normed, self.lm_head)
        if self.communicator.world == 1:
            return logits
        # By device, then by row, each device's part of the vocabulary; the last one's ends in padding.
        parts = self.communicator.all_gather(logits.contiguous())
        return parts.transpose(0, 1).flatten(1)[:, : self.config.vocab_size]

    def profile(self, lengths: list[int], num_seqs: int) -> None:
        """Prefill prompts of `lengths`, and `num_seqs` rows of logits, to see what memory a step needs."""
        device = self.device.torch_device
        num_tokens = sum(lengths)
        batch = whole_sequences(lengths, self.limits.block_size, device)
        num_blocks = sum(-(-length // self.limits.block_size) for length in lengths)
        shared = {spec: runner.new_cache(num_blocks) for spec, runner in self.runners.items()}
        ids = torch.zeros(num_tokens, dtype=torch.int64, device=device)
        positions = torch.cat([torch.arange(length, device=device) for length in lengths])
        caches = [shared[layer.spec] for layer in self.layers]
        entering = None if self.spec.first else self.new_hidden(num_tokens)
        hidden = self.forward(ids, positions, batch, caches, entering=entering, tap=self.tap)
        if not self.spec.last:
            return
        rows = torch.arange(num_seqs, device=device) % num_tokens
        self.logits(hidden[rows]).float()

    def _add_norm(self, x: Tensor, residual: Tensor, weight: Tensor, packed: Any) -> tuple[Rows, Tensor]:
        """`add_rms_norm` for a product by `packed`."""
        eps, rounding = self.config.rms_norm_eps, self._rounding(packed)
        if rounding is None:
            return self.operations.add_rms_norm(x, residual, weight, eps)
        return self.operations.rounded_add_rms_norm(x, residual, weight, eps, rounding)

    def _gate(self, gate_up: Tensor, packed: Any) -> Rows:
        """`gate` for a product by `packed`."""
        rounding = self._rounding(packed)
        if rounding is None:
            return self.operations.gate(gate_up)
        return self.operations.rounded_gate(gate_up, rounding)

    def _rounding(self, packed: Any) -> str | None:
        """How what makes a product's rows rounds them; None = the product does what is needed."""
        rounding = self.linear.rounding(packed)
        return rounding if rounding in self.operations.roundings else None

    def _product(self, x: Rows, packed: Any, bias: Tensor | None = None) -> Tensor:
        if isinstance(x, RoundedRows):
            return self.linear.run_rounded(x, packed, bias)
        return self.linear.run(x, packed, bias)

    def _embed(self, ids: Tensor) -> Tensor:
        """Rows of the embedding; each device has those of a part of the vocabulary."""
        table = self.weights.embedding
        assert table is not None, "only the first stage embeds ids"
        if self.communicator.world == 1:
            return self.operations.embed(ids, table)
        own = ids - self.communicator.rank * len(table)
        here = (own >= 0) & (own < len(table))
        rows = self.operations.embed(torch.where(here, own, 0), table)
        return self.communicator.all_reduce(rows.mul_(here[:, None]))

    def _summed(self, share: Tensor) -> Tensor:
        """The sum over all devices of what a product divided by columns gives each."""
        return share if self.communicator.world == 1 else self.communicator.all_reduce(share)

    def _write(self, layer: Layer, x: Rows, positions: Tensor, batch: Batch, cache: Any) -> Tensor:
        """Queries [T, q_heads, head_dim], rotated; the keys and values go into the cache."""
        runner = layer.runner
        qkv = self._product(x, layer.qkv, layer.weights.qkv_bias)
        if runner.fused_write:
            return runner.rotate_and_write(qkv, positions, layer.rotation, cache, batch)
        q, k, v = self.operations.rotate(qkv, positions, layer.rotation, layer.spec)
        runner.write(cache, k, v, batch)
        return q

    def _require_served(self) -> None:
        """Before anything is packed: the weights' own schemes, whatever the config says of them."""
        products = {product.role: product for product in self.spec.products}
        asked = [
            products[role].weight_spec(self.dtype, held.scheme) for role, held in self.weights.products()
        ]
        for spec in dict.fromkeys(asked):
            if reasons := self.linear.refusals(spec, self.device):
                raise BackendError(
                    f"{self.linear.name} linear cannot serve {spec.role} [{spec.n}, {spec.k}] as "
                    f"{name_of(spec.scheme)}: {'; '.join(reasons)}."
                )

    def _pack(self, held: Held) -> Any:
        if isinstance(held, PackedWeight):
            return self.linear.take(held, self.device)
        return self.linear.pack(held, self.device)


def whole_sequences(lengths: list[int], block_size: int, device: torch.device) -> Batch:
    """The batch of whole sequences in blocks 0, 1, 2, ...: a forward pass without an engine."""
    tokens = torch.tensor(lengths, dtype=torch.int32)
    blocks = -(-tokens // block_size)
    first = blocks.cumsum(0, dtype=torch.int32) - blocks
    table = first[:, None] + torch.arange(int(blocks.max()), dtype=torch.int32)
    slots = [start * block_size + torch.arange(length) for start, length in zip(first, lengths, strict=True)]
    ends = tokens.cumsum(0, dtype=torch.int32)
    return Batch(
        query_start=torch.cat((torch.zeros(1, dtype=torch.int32), ends)).to(device),
        seq_lens=tokens.to(device),
        block_table=table.to(device),
        slots=torch.cat(slots).to(device),
        num_seqs=len(lengths),
        num_tokens=sum(lengths),
        num_decodes=len(lengths) if max(lengths) == 1 else 0,
        max_query=max(lengths),
        max_len=max(lengths),
    )
