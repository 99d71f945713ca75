"""What a decoder looks like: read from a Hugging Face config, with the sizes that follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from backbench.errors import EngineError

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
"""Architecture in a config.json -> the short name used here."""
ROPE_KINDS = ("default", "linear", "llama3", "yarn")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class RopeConfig:
    """A rotary embedding's base and how it is stretched to longer contexts; see `engine.models.rope`."""

    theta: float = 10_000.0
    kind: str = "default"
    """One of `ROPE_KINDS`."""
    factor: float = 1.0
    original_max_len: int = 0
    """Context length before stretching (llama3, yarn)."""
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    """Multiplies cosines and sines (yarn); None = from `factor`."""
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's shape and the declared differences within the Llama family."""

    architecture: str
    """"llama", "mistral", "qwen2" or "qwen3"."""
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

    @property
    def qkv_size(self) -> int:
        """Output features of the fused query, key and value projection."""
        return (self.q_heads + 2 * self.kv_heads) * self.head_dim

    @property
    def linear_parameters(self) -> int:
        """Parameters of all matrix multiplications of one token, the output head included."""
        attention = (self.qkv_size + self.q_heads * self.head_dim) * self.hidden_size
        layer = attention + 3 * self.hidden_size * self.ffn_size
        return self.num_layers * layer + self.vocab_size * self.hidden_size

    @property
    def num_parameters(self) -> int:
        """Parameters of the model; a tied embedding counts once."""
        layer = 2 * self.hidden_size
        layer += self.qkv_size if self.qkv_bias else 0
        layer += 2 * self.head_dim if self.qk_norm else 0
        embedding = 0 if self.tied_embeddings else self.vocab_size * self.hidden_size
        return self.linear_parameters + embedding + self.num_layers * layer + self.hidden_size

    def weight_bytes(self, dtype: torch.dtype) -> int:
        """Bytes the weights take in `dtype`."""
        return self.num_parameters * dtype.itemsize

    def streamed_weight_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of weights one step must read: an untied embedding is only looked up."""
        looked_up = 0 if self.tied_embeddings else self.vocab_size * self.hidden_size
        return (self.num_parameters - looked_up) * dtype.itemsize

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes of keys and values one token leaves in the caches of all layers."""
        return 2 * self.num_layers * self.kv_heads * self.head_dim * dtype.itemsize

    def flops_per_token(self, context: int) -> int:
        """Floating-point operations to compute one token that attends to `context` keys, logits included.

        Two per multiply-add: 2 * parameters of the linears, and 4 * heads * head_dim per key and layer
        (scores and weighted sum).
        """
        keys = sum(min(context, window or context) for window in self.windows)
        return 2 * self.linear_parameters + 4 * self.q_heads * self.head_dim * keys


def from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json, in transformers 5's layout or an older one.

    Raises:
        EngineError: an unknown architecture (what is known is listed), a missing field, or a variant
            of the family that this engine does not compute.
    """
    architecture = _architecture(config)
    _refuse_variants(config, architecture)
    hidden_size = _require(config, "hidden_size")
    q_heads = _require(config, "num_attention_heads")
    kv_heads = config.get("num_key_value_heads") or q_heads
    if q_heads % kv_heads:
        raise EngineError(
            f"The config's {q_heads} attention heads do not divide among {kv_heads} key-value heads."
        )
    num_layers = _require(config, "num_hidden_layers")
    max_len = _require(config, "max_position_embeddings")
    return ModelConfig(
        architecture=architecture,
        vocab_size=_require(config, "vocab_size"),
        hidden_size=hidden_size,
        num_layers=num_layers,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=config.get("head_dim") or hidden_size // q_heads,
        ffn_size=_require(config, "intermediate_size"),
        rms_norm_eps=config.get("rms_norm_eps", 1e-6),
        rope=_rope(config, max_len),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=architecture == "qwen2",
        qk_norm=architecture == "qwen3",
        windows=_windows(config, architecture, num_layers),
        max_len=max_len,
        eos_token_ids=eos_token_ids(config),
        dtype=_dtype(config),
    )


def eos_token_ids(config: Mapping[str, Any]) -> tuple[int, ...]:
    """The end-of-sequence ids of a config.json or generation_config.json."""
    eos = config.get("eos_token_id")
    if eos is None:
        return ()
    return (eos,) if isinstance(eos, int) else tuple(eos)


def _require(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or value < 1:
        raise EngineError(f"The model's config needs a positive integer {name!r}; it has {value!r}.")
    return value


def _architecture(config: Mapping[str, Any]) -> str:
    named = config.get("architectures") or []
    for name in named:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    model_type = config.get("model_type")
    if not named and model_type in ARCHITECTURES.values():
        return str(model_type)
    raise EngineError(
        f"Unknown architecture {', '.join(named) or model_type or 'none given'}; "
        f"known are {', '.join(ARCHITECTURES)}."
    )


def _refuse_variants(config: Mapping[str, Any], architecture: str) -> None:
    """Raise where the config asks for something that would be computed wrongly."""
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise EngineError(f"The checkpoint is quantized ({method}); give one in bf16, fp16 or fp32.")
    if config.get("hidden_act", "silu") != "silu":
        raise EngineError(f"Activation {config['hidden_act']!r} is not served; only silu is.")
    if architecture != "qwen2" and config.get("attention_bias"):
        raise EngineError(f"A {architecture} model with attention_bias is not served.")
    if config.get("mlp_bias"):
        raise EngineError(f"A {architecture} model with mlp_bias is not served.")


def _rope(config: Mapping[str, Any], max_len: int) -> RopeConfig:
    """The rotary settings of `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`."""
    values = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = values.get("rope_type") or values.get("type") or "default"
    if any(isinstance(value, Mapping) for value in values.values()):
        raise EngineError("rope_parameters that differ by layer type are not served.")
    if kind not in ROPE_KINDS:
        raise EngineError(f"Unknown rope type {kind!r}; known are {', '.join(ROPE_KINDS)}.")
    partial = values.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise EngineError(f"A partial_rotary_factor of {partial} is not served; only 1 is.")
    original = values.get("original_max_position_embeddings") or max_len
    factor = values.get("factor")
    if factor is None:
        if kind in ("linear", "llama3"):
            raise EngineError(f"Rope type {kind!r} needs a 'factor' in the config's rope_parameters.")
        factor = max_len / original
    return RopeConfig(
        theta=float(values.get("rope_theta") or config.get("rope_theta") or 10_000.0),
        kind=kind,
        factor=float(factor),
        original_max_len=int(original),
        low_frequency_factor=float(values.get("low_freq_factor", 1.0)),
        high_frequency_factor=float(values.get("high_freq_factor", 4.0)),
        beta_fast=float(values.get("beta_fast") or 32.0),
        beta_slow=float(values.get("beta_slow") or 1.0),
        attention_factor=values.get("attention_factor"),
        mscale=values.get("mscale"),
        mscale_all_dim=values.get("mscale_all_dim"),
        truncate=bool(values.get("truncate", True)),
    )


def _windows(config: Mapping[str, Any], architecture: str, num_layers: int) -> tuple[int | None, ...]:
    """Each layer's sliding window, as each architecture declares it in transformers."""
    window = config.get("sliding_window")
    if architecture == "llama" or window is None:
        return (None,) * num_layers
    if architecture == "mistral":
        return (window,) * num_layers
    if not config.get("use_sliding_window", False):
        return (None,) * num_layers
    kinds = config.get("layer_types")
    if kinds is None:
        first = config.get("max_window_layers", num_layers)
        return tuple(window if layer >= first else None for layer in range(num_layers))
    if len(kinds) != num_layers:
        raise EngineError(f"The config's layer_types names {len(kinds)} layers of {num_layers}.")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _dtype(config: Mapping[str, Any]) -> torch.dtype:
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise EngineError(f"A checkpoint in {name} is not served; use one in {', '.join(DTYPES)}.")
    return DTYPES[name]
