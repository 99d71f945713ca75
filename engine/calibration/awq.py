"""AWQ: features that matter are made larger before they are rounded, and what feeds them smaller.

Source: Lin et al. 2024, "AWQ: Activation-aware Weight Quantization", section 3.2: s = mean|x|^alpha, the
alpha that changes the product's outputs least. The inverse goes where it changes nothing but rounding: into
the norm before `qkv`, `gate_up` and the head, and into the rows that make the features of `attention_output`
(those of the values) and of `down` (those of "up").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from backbench.backends.interface import Weight
from backbench.backends.quantization import dequantize
from backbench.engine.calibration.inputs import InputStatistics
from backbench.engine.models.layers import LayerAttention
from backbench.engine.models.weights import LayerWeights

ALPHAS = [step / 20 for step in range(20)]
SMALLEST = 1e-4
Round = Callable[[Tensor], Weight]
"""[N, K] in fp32 as the scheme keeps it."""


def output_error(rounded: Tensor, dense: Tensor, gram: Tensor) -> float:
    """The squared error of all outputs over the calibration's rows: tr(D gram D^T), D = rounded - dense."""
    difference = (rounded - dense).double()
    return float(((difference @ gram) * difference).sum())


def best_scale(dense: Tensor, magnitude: Tensor, gram: Tensor, round_: Round) -> Tensor:
    """f32 [K]: what to multiply the columns of `dense` [N, K] by before they are rounded; 1 if nothing helps.

    magnitude: f32 [K], what the scale is a power of; features that are equal there have one scale.
    """
    best, least = torch.ones_like(magnitude), float("inf")
    for alpha in ALPHAS:
        scale = magnitude.clamp(min=SMALLEST) ** alpha
        scale = scale / (scale.max() * scale.min()).sqrt()
        found = dequantize(round_(dense * scale), torch.float32) / scale
        if (error := output_error(found, dense, gram)) < least:
            best, least = scale, error
    return best


def rescale_layer(
    layer: LayerWeights,
    statistics: Mapping[str, InputStatistics],
    attention: LayerAttention,
    round_: Mapping[str, Round],
    dtype: torch.dtype,
) -> None:
    """Change a layer's dense fp32 weights in place so that they round better; its function stays.

    Every scale is found on the weights as they were. dtype: what norms will be stored in.
    """
    heads = (attention.kv_heads, attention.q_heads // attention.kv_heads, attention.head_dim)
    magnitudes = {role: found.mean_magnitude for role, found in statistics.items()}
    # Queries that share keys and values share the rows that make their features, and so one scale.
    of_values = magnitudes["attention_output"].view(heads).mean(1, keepdim=True)
    magnitudes["attention_output"] = of_values.expand(heads).flatten()
    scales = {
        role: best_scale(_dense(layer, role), magnitudes[role], found.gram, round_[role])
        for role, found in statistics.items()
    }
    layer.attention_norm = fold_into_norm(layer.attention_norm, _dense(layer, "qkv"), scales["qkv"], dtype)
    layer.ffn_norm = fold_into_norm(layer.ffn_norm, _dense(layer, "gate_up"), scales["gate_up"], dtype)

    values = slice((attention.q_heads + attention.kv_heads) * attention.head_dim, None)
    scale = scales["attention_output"]
    _dense(layer, "attention_output").mul_(scale)
    by_head = scale.view(heads)[:, 0].flatten()
    _dense(layer, "qkv")[values].div_(by_head[:, None])
    if layer.qkv_bias is not None:
        layer.qkv_bias[values] /= by_head

    down = _dense(layer, "down")
    down.mul_(scales["down"])
    _dense(layer, "gate_up")[down.shape[1] :].div_(scales["down"][:, None])


def fold_into_norm(norm: Tensor, dense: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The norm's weights [K] divided by about `scale`, as `dtype` holds them; `dense` [N, K] is multiplied by
    exactly what they were divided by, in place."""
    smaller = (norm / scale).to(dtype).float()
    dense.mul_(torch.where(smaller == 0, 1.0, norm / smaller))
    return torch.where(smaller == 0, norm, smaller)


def _dense(layer: LayerWeights, role: str) -> Tensor:
    held = getattr(layer, role)
    assert isinstance(held, Weight) and held.scheme.dense
    return held.q
