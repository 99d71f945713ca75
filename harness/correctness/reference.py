"""The torch backend's answer on given tokens, in the model's dtype and in a wider one.

Both are plain forward passes over whole sequences. Each layer has read its keys and values before the next
one writes its own, so all layers share one cache; and the wider pass widens one matrix at a time, so that
no second copy of the weights is ever held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from backbench.backends.interface import (
    Attention,
    AttentionSpec,
    Device,
    Linear,
    Operations,
    PackedWeight,
    Rotation,
    SamplingBatch,
    Scheme,
    Selection,
    Weight,
)
from backbench.backends.quantization import dequantize, meant_rows
from backbench.backends.torch.attention import TorchAttention, TorchRunner
from backbench.backends.torch.linear import TorchLinear
from backbench.backends.torch.operations import TorchOperations
from backbench.engine.limits import StepLimits
from backbench.engine.models.config import ModelConfig
from backbench.engine.models.decoder import Decoder, whole_sequences
from backbench.engine.models.weights import Weights

WIDENED_VALUES = 1 << 26
"""Weights of one matrix that are held in the wider dtype at once."""
LOGIT_ROWS = 64
"""Rows of logits held at once."""
BLOCK_SIZE = 64


def wider(dtype: torch.dtype) -> torch.dtype:
    """In which the rounding of `dtype` is seen: fp32 for 16-bit ones, fp64 for fp32."""
    return torch.float64 if dtype == torch.float32 else torch.float32


@dataclass(frozen=True)
class Text:
    """A prompt and the tokens after it, whose log-probabilities are wanted."""

    prompt: list[int]
    output: list[int]


@dataclass(frozen=True)
class Scores:
    """Of every output token of every text, in order."""

    logprobs: Tensor
    """f64[N] on the CPU."""
    top_tokens: Tensor
    """i64[N]: the most likely token at each place."""


def torch_decoder(
    config: ModelConfig,
    weights: Weights,
    device: Device,
    dtype: torch.dtype,
    max_len: int,
    attention: Attention | None = None,
    linear: Linear | None = None,
    kv_dtype: torch.dtype | None = None,
) -> Decoder:
    """The torch backend on these weights, in their own dtype; kv_dtype: None = the same."""
    own = attention or TorchAttention()
    selection = Selection("torch", device, own, linear or PlainLinear(), TorchOperations())
    return _decoder(config, weights, selection, dtype, max_len, kv_dtype)


def wide_decoder(
    config: ModelConfig,
    weights: Weights,
    device: Device,
    dtype: torch.dtype,
    max_len: int,
    kv_dtype: torch.dtype | None = None,
    linear: Linear | None = None,
) -> Decoder:
    """The same weights, computed in the wider `dtype`; kv_dtype: of the cache, None = the same."""
    own = linear or WideLinear()
    selection = Selection("torch", device, WideAttention(), own, WideOperations(dtype))
    return _decoder(config, weights, selection, dtype, max_len, kv_dtype)


def _decoder(
    config: ModelConfig,
    weights: Weights,
    selection: Selection,
    dtype: torch.dtype,
    max_len: int,
    kv_dtype: torch.dtype | None,
) -> Decoder:
    limits = StepLimits(
        block_size=BLOCK_SIZE, max_len=max_len, max_seqs=1, max_step_tokens=max_len, prefill_chunk=max_len
    )
    return Decoder(config, weights, selection, dtype=dtype, limits=limits, kv_dtype=kv_dtype)


@torch.inference_mode()
def score(decoder: Decoder, texts: Sequence[Text]) -> Scores:
    """Every output token's log-probability after all that precedes it in its text."""
    device = decoder.device.torch_device
    # The last token of a text predicts nothing that is asked for.
    ids = [(text.prompt + text.output)[:-1] for text in texts]
    lengths = [len(each) for each in ids]
    batch = whole_sequences(lengths, decoder.limits.block_size, device)
    blocks = sum(-(-length // decoder.limits.block_size) for length in lengths)
    shared = {spec: runner.new_cache(blocks) for spec, runner in decoder.runners.items()}
    positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
    tokens = torch.tensor([token for each in ids for token in each], device=device)
    hidden = decoder.forward(tokens, positions, batch, [shared[layer.spec] for layer in decoder.layers])
    places: list[int] = []
    end = 0
    for text, length in zip(texts, lengths, strict=True):
        end += length
        places += range(end - len(text.output), end)
    wanted = torch.tensor([token for text in texts for token in text.output], device=device)
    chosen, top = [], []
    for some, asked in zip(torch.tensor(places).split(LOGIT_ROWS), wanted.split(LOGIT_ROWS), strict=True):
        logits = decoder.logits(hidden[some.to(device)])
        logprobs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        chosen.append(logprobs.gather(1, asked[:, None])[:, 0].double().cpu())
        top.append(logprobs.argmax(-1).cpu())
    return Scores(torch.cat(chosen), torch.cat(top))


class WideAttention(TorchAttention):
    """The torch backend's attention in any dtype."""

    def refusals(self, spec: AttentionSpec, device: Device) -> list[str]:
        return []

    def open(self, spec: AttentionSpec, device: Device) -> TorchRunner:
        return TorchRunner(spec, device)


class PlainLinear(TorchLinear):
    """The torch backend's products of weights that another one packed: each is unpacked while it is used."""

    def take(self, held: PackedWeight, device: Device) -> Any:
        return held

    def run(self, x: Tensor, packed: Any, bias: Tensor | None = None) -> Tensor:
        return super().run(x, packed.canonical() if isinstance(packed, PackedWeight) else packed, bias)


class WideLinear(Linear):
    """Products in the input's dtype of weights in a narrower one, widened as they are needed.

    A quantized weight's numbers are fp32, which nothing has rounded to the model's dtype; rows that its
    scheme rounds are rounded from what the wider pass computed.
    """

    name = "torch, widened"

    def refusals(self, *args: Any, **kwargs: Any) -> list[str]:
        return []

    def pack(self, weight: Weight, device: Device) -> Tensor | Weight:
        return weight.q if weight.scheme == Scheme() else weight

    def take(self, held: PackedWeight, device: Device) -> PackedWeight:
        return held

    def run(self, x: Tensor, packed: Tensor | Weight | PackedWeight, bias: Tensor | None = None) -> Tensor:
        weight = packed.canonical() if isinstance(packed, PackedWeight) else packed
        if isinstance(weight, Tensor):
            weight = Weight(Scheme(), weight)
        rows = max(1, WIDENED_VALUES // weight.k // weight.scheme.group_n) * weight.scheme.group_n
        x = meant_rows(x, weight)
        parts = [weight.rows(start, min(start + rows, weight.n)) for start in range(0, weight.n, rows)]
        out = torch.cat([functional.linear(x, _widened(part, x.dtype)) for part in parts], dim=-1)
        return out if bias is None else out + bias.to(x.dtype)


def _widened(weight: Weight, dtype: torch.dtype) -> Tensor:
    return weight.q.to(dtype) if weight.scheme.dense else dequantize(weight, torch.float32).to(dtype)


class WideOperations(Operations):
    """The elementwise operations, every intermediate in `dtype`."""

    name = "torch, widened"

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def refusals(self, *args: Any, **kwargs: Any) -> list[str]:
        return []

    def embed(self, ids: Tensor, table: Tensor) -> Tensor:
        return functional.embedding(ids, table).to(self.dtype)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(self.dtype)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        residual = x + residual
        return self.rms_norm(residual, weight, eps), residual

    def rotate(
        self, qkv: Tensor, positions: Tensor, rotation: Rotation, spec: AttentionSpec
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads = qkv.view(qkv.shape[0], spec.q_heads + 2 * spec.kv_heads, spec.head_dim)
        q, k, v = heads.split([spec.q_heads, spec.kv_heads, spec.kv_heads], dim=1)
        if rotation.q_norm is not None:
            q = self.rms_norm(q, rotation.q_norm, rotation.eps)
        if rotation.k_norm is not None:
            k = self.rms_norm(k, rotation.k_norm, rotation.eps)
        table = rotation.rotary.cos_sin[positions].to(self.dtype)[:, None]
        return self._rotate(q, table), self._rotate(k, table), v

    def _rotate(self, x: Tensor, table: Tensor) -> Tensor:
        cos, sin = table.chunk(2, dim=-1)
        half = cos.shape[-1]
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)

    def gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate) * up

    def sample(self, logits: Tensor, sampling: SamplingBatch) -> Tensor:
        raise NotImplementedError("The wide pass scores given tokens; it samples none.")
