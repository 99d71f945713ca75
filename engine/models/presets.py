"""Known model shapes, to be filled with random weights: speed work needs no download.

Values are those of the config.json each model was published with.
"""

from __future__ import annotations

from typing import Any

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _config(
    architecture: str,
    *,
    vocab: int,
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    ffn: int,
    eps: float,
    rope: dict[str, Any],
    max_len: int,
    tied: bool = False,
    window: int | None = None,
) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": ffn,
        "rms_norm_eps": eps,
        "rope_parameters": rope,
        "max_position_embeddings": max_len,
        "tie_word_embeddings": tied,
        "sliding_window": window,
        "hidden_act": "silu",
        "dtype": "bfloat16",
    }


def _rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


def _qwen3(hidden: int, layers: int, heads: int, ffn: int, tied: bool = False) -> dict[str, Any]:
    return _config(
        "Qwen3ForCausalLM",
        vocab=151_936,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=8,
        head_dim=128,
        ffn=ffn,
        eps=1e-6,
        rope=_rope(1_000_000.0),
        max_len=40_960,
        tied=tied,
    )


def _llama31(hidden: int, layers: int, heads: int, ffn: int) -> dict[str, Any]:
    return _config(
        "LlamaForCausalLM",
        vocab=128_256,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=8,
        head_dim=128,
        ffn=ffn,
        eps=1e-5,
        rope=LLAMA3_ROPE,
        max_len=131_072,
    )


SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": _qwen3(1024, 28, 16, 3072, tied=True),
    "qwen3-8b": _qwen3(4096, 36, 32, 12_288),
    "qwen3-32b": _qwen3(5120, 64, 64, 25_600),
    "llama-2-7b": _config(
        "LlamaForCausalLM",
        vocab=32_000,
        hidden=4096,
        layers=32,
        heads=32,
        kv_heads=32,
        head_dim=128,
        ffn=11_008,
        eps=1e-5,
        rope=_rope(10_000.0),
        max_len=4096,
    ),
    "llama-3.1-8b": _llama31(4096, 32, 32, 14_336),
    "llama-3.1-70b": _llama31(8192, 80, 64, 28_672),
    "mistral-7b": _config(
        "MistralForCausalLM",
        vocab=32_000,
        hidden=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        ffn=14_336,
        eps=1e-5,
        rope=_rope(10_000.0),
        max_len=32_768,
        window=4096,
    ),
    "qwen2.5-7b": _config(
        "Qwen2ForCausalLM",
        vocab=152_064,
        hidden=3584,
        layers=28,
        heads=28,
        kv_heads=4,
        head_dim=128,
        ffn=18_944,
        eps=1e-6,
        rope=_rope(1_000_000.0),
        max_len=32_768,
    ),
}
"""Name after `shape:` -> config, in the layout of a Hugging Face config.json."""
