"""AWQ's scales change what is rounded and nothing of what a layer computes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from backbench.backends.interface import Scheme
from backbench.backends.interface.device import cpu
from backbench.backends.quantization import SCHEMES, dequantize, quantize
from backbench.engine.calibration.awq import best_scale, fold_into_norm, output_error, rescale_layer
from backbench.engine.calibration.inputs import PRODUCTS, LayerByLayer
from backbench.engine.models.config import ModelConfig
from backbench.engine.models.hf_config import from_hf
from backbench.engine.models.presets import SHAPES
from backbench.engine.models.weights import random_weights

CPU = torch.device("cpu")
SCHEME = Scheme("int4", group=32)


def small(family: str) -> ModelConfig:
    """One layer, four heads of queries to two of keys; biases in Qwen2, norms of both in Qwen3."""
    shape = {"qwen2": "qwen2.5-7b", "qwen3": "qwen3-0.6b"}[family]
    sizes = {"hidden_size": 128, "ffn_size": 192, "q_heads": 4, "kv_heads": 2, "head_dim": 32}
    return replace(from_hf(SHAPES[shape]), vocab_size=64, num_layers=1, windows=(None,), **sizes)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_the_layer_computes_what_it_did(family: str) -> None:
    config = small(family)
    weights = random_weights(config, CPU, torch.float32)
    layer, generator = weights.layers[0], torch.Generator().manual_seed(0)
    for norm in (layer.attention_norm, layer.ffn_norm):
        norm.copy_(torch.rand(norm.shape, generator=generator) ** 4 * 4)  # some features matter far more
    layer.attention_norm[3] = 0.0
    for role in PRODUCTS:
        getattr(layer, role).q.normal_(0.0, 0.1, generator=generator)
    if layer.qkv_bias is not None:
        layer.qkv_bias.normal_(generator=generator)
    weights.embedding.normal_(generator=generator)
    sequences = torch.randint(0, 64, (2, 20), generator=generator).tolist()
    walk = LayerByLayer(config, cpu(), weights.embedding, sequences)
    found = walk.observe(0, layer)
    before = {role: getattr(layer, role).q.clone() for role in PRODUCTS}
    walk.advance(0, layer)
    rounds = dict.fromkeys(PRODUCTS, lambda dense: quantize(dense, SCHEME))
    rescale_layer(layer, found, config.spec.layers[0].attention, rounds, torch.bfloat16)
    again = LayerByLayer(config, cpu(), weights.embedding, sequences)
    again.advance(0, layer)
    for one, other in zip(walk.hidden, again.hidden, strict=True):
        # Products of fp32 factors and their inverses: some 1e-6.
        assert (one - other).norm() < 1e-5 * one.norm()
    for role in PRODUCTS:
        assert not torch.allclose(getattr(layer, role).q, before[role], rtol=0.05), role
    for norm in (layer.attention_norm, layer.ffn_norm):
        assert torch.equal(norm, norm.bfloat16().float()), "what is stored is what was divided by"


@pytest.mark.parametrize("name", ["int8", "int4-g32", "nvfp4", "mxfp4"])
def test_a_scale_never_costs_more_than_none(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    dense = torch.randn(48, 64, generator=generator)
    x = torch.randn(256, 64, generator=generator) * torch.rand(64, generator=generator) ** 6
    gram = (x.T @ x).double()
    rounded = lambda weights: quantize(weights, SCHEMES[name])  # noqa: E731
    scale = best_scale(dense, x.abs().mean(0), gram, rounded)
    with_scale = dequantize(rounded(dense * scale), torch.float32) / scale
    without = dequantize(rounded(dense), torch.float32)
    errors = [output_error(each, dense, gram) for each in (with_scale, without)]
    assert errors[0] < 0.9 * errors[1] if name != "mxfp4" else errors[0] <= errors[1]


def test_the_error_is_that_of_the_outputs() -> None:
    dense, rounded, x = torch.randn(5, 8), torch.randn(5, 8), torch.randn(20, 8)
    expected = (x.double() @ (rounded - dense).double().T).pow(2).sum()
    assert output_error(rounded, dense, (x.double().T @ x.double())) == pytest.approx(float(expected))


def test_a_norm_that_would_vanish_in_its_dtype_is_left() -> None:
    dense, norm = torch.ones(2, 3), torch.tensor([1.0, 0.0, 2.0**-23])
    found = fold_into_norm(norm, dense, torch.tensor([3.0, 2.0, 10.0]), torch.float16)
    assert found.tolist() == pytest.approx([0.33325195, 0.0, 2.0**-23])
    assert dense[0].tolist() == pytest.approx([1 / 0.33325195, 1.0, 1.0])
