"""Checkpoints that the public tools wrote mean here what they mean there.

`tools/quantized_fixtures.py` wrote the fixtures, and beside each the logits of the tool's own loading.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_checkpoints import FIXTURES, LAYER, NAMES, copy_of, rewrite
from safetensors.torch import load_file

from backbench.backends.interface import Linear, Weight
from backbench.backends.interface.device import cpu
from backbench.backends.quantization import dequantize, packed, product, rounded_rows, unpacked
from backbench.backends.registry import select
from backbench.engine.limits import StepLimits
from backbench.engine.models.checkpoint import find_model
from backbench.engine.models.decoder import Decoder, attention_specs, whole_sequences

CPU = torch.device("cpu")
LIMITS = StepLimits(block_size=16, max_len=64, max_seqs=1, max_step_tokens=64, prefill_chunk=64)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class ByDefinition(Linear):
    """Every product as `backends.quantization` defines it, of weights as the tool makes them dense."""

    dense: torch.dtype = torch.float32
    name = "definition"

    def refusals(self, spec, device):
        return []

    def pack(self, weight, device):
        return weight

    def run(self, x, packed: Weight, bias=None):
        if self.dense == torch.float32 or packed.scheme.dense:
            return product(x, packed).to(x.dtype)
        if packed.scheme.activation is not None:
            codes, scale = rounded_rows(x, packed.scheme.activation, packed.input_scale)
            x = (codes.float().unflatten(1, (scale.shape[1], -1)) * scale[..., None]).flatten(1)
        if packed.order is not None:
            x = x[:, packed.order]
        return x @ dequantize(packed, self.dense).float().T


def how(name: str) -> dict[str, Any]:
    return json.loads((FIXTURES / name / "how.json").read_text())


def logits(
    folder: Path, ids: torch.Tensor, linear: Linear | None = None, *, rounded: bool = True
) -> torch.Tensor:
    """[T, V] in fp32; linear: None = the torch backend's; rounded: False = activations are left alone."""
    source = find_model(str(folder))
    weights = source.load_weights(CPU, torch.float32)
    if not rounded:
        for layer in weights.layers:
            for held in vars(layer).values():
                if isinstance(held, Weight):
                    held.scheme = replace(held.scheme, activation=None)
    specs = attention_specs(source.config, dtype=torch.float32, limits=LIMITS)
    products = source.config.spec.weight_specs(torch.float32)
    selection = select("torch", device=cpu(), specs=specs, weights=products, dtype=torch.float32)
    selection = selection if linear is None else replace(selection, linear=linear)
    decoder = Decoder(source.config, weights, selection, dtype=torch.float32, limits=LIMITS)
    batch = whole_sequences([len(ids)], LIMITS.block_size, CPU)
    caches = decoder.new_caches(LIMITS.blocks_per_seq)
    return decoder.logits(decoder.forward(ids, torch.arange(len(ids)), batch, caches))


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, of all logits together."""
    return float((found - expected.float()).norm() / expected.float().norm())


def tolerance(name: str) -> float:
    """What the dtype's rounding makes of the logits; the least that a rounding left out makes is 0.02.

    fp32: sums in another order, measured 7e-7. fp16: the tool computes in it, and its unit of 5e-4 adds up
    over a dozen roundings, measured 1.3e-3. Rounded activations: as fp32, unless a sum's last bit takes
    one code to its neighbour, which is an eighth of one of 256 features of one of 32 tokens.
    """
    if how(name)["dense_weights"] == "fp16":
        return 4e-3
    return 5e-3 if activation(name) else 1e-5


def activation(name: str) -> bool:
    products = find_model(str(FIXTURES / name)).config.spec.products
    return any(each.scheme.activation is not None for each in products)


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_the_tool_s_own(name):
    expected = load_file(FIXTURES / name / "expected.safetensors")
    dense = DTYPES[how(name)["dense_weights"]]
    # transformers runs DeepSeek's fp8 on a CPU with dense weights, and leaves the rows as they are.
    rounded = name != "deepseek-fp8"
    linear = ByDefinition(dense if dense != torch.float16 else torch.float32)
    found = logits(FIXTURES / name, expected["ids"], linear, rounded=rounded)
    assert error(found, expected["logits"]) < tolerance(name)
    if rounded and activation(name):
        left = logits(FIXTURES / name, expected["ids"], linear, rounded=False)
        assert error(left, expected["logits"]) > 4 * tolerance(name)


@pytest.mark.parametrize("name", NAMES)
def test_the_torch_backend_gives_the_same(name):
    ids = load_file(FIXTURES / name / "expected.safetensors")["ids"]
    expected = logits(FIXTURES / name, ids, ByDefinition())
    assert error(logits(FIXTURES / name, ids), expected) < (5e-3 if activation(name) else 1e-5)


def test_deepseek_fp8_rounds_activations_as_the_same_numbers_in_compressed_tensors():
    expected = load_file(FIXTURES / "ct-fp8-block" / "expected.safetensors")
    found = logits(FIXTURES / "deepseek-fp8", expected["ids"], ByDefinition())
    assert error(found, expected["logits"]) < tolerance("ct-fp8-block")


def test_every_format_is_among_the_fixtures():
    wanted = {
        *("ct-w4a16", "ct-w4a16-asym", "ct-w8a16", "ct-w8a8", "ct-w8a8-static"),
        *("ct-fp8", "ct-fp8-dynamic", "ct-fp8-block", "deepseek-fp8"),
        *("ct-nvfp4a16", "ct-nvfp4", "ct-mxfp4a16", "ct-mxfp4", "ct-mxfp8", "ct-mixed"),
        *("gptq-w4", "gptq-w4-asym", "gptq-w4-act-order", "gptq-w8", "gptq-v2-w4-asym", "gptq-mixed"),
        "awq-w4",
    }
    assert wanted == set(NAMES)


def test_mixed_and_ignored_linears_keep_their_own_schemes():
    spec = find_model(str(FIXTURES / "ct-mixed")).config.spec
    kept = {each.role: str(each.scheme) for each in spec.products}
    assert kept == {
        "qkv": "int4(group=32, zero_point=True)",
        "attention_output": "int4(group=32, zero_point=True)",
        "gate_up": "fp8(activation=fp8-token)",
        "down": "dense",
        "head": "int8",
    }
    spec = find_model(str(FIXTURES / "gptq-mixed")).config.spec
    kept = {each.role: str(each.scheme) for each in spec.products}
    assert kept == {
        "qkv": "int4(group=128)",
        "attention_output": "int4(group=128)",
        "gate_up": "int8(group=32, zero_point=True)",
        "down": "dense",
        "head": "dense",
    }


def test_act_order_is_an_order_of_columns():
    layer = find_model(str(FIXTURES / "gptq-w4-act-order")).load_weights(CPU, torch.float32).layers[0]
    plain = find_model(str(FIXTURES / "gptq-w4")).load_weights(CPU, torch.float32).layers[0]
    assert plain.down.order is None
    assert layer.down.order is not None and sorted(layer.down.order.tolist()) == list(range(384))
    groups = load_file(FIXTURES / "gptq-w4-act-order" / "model.safetensors")[f"{LAYER}mlp.down_proj.g_idx"]
    assert groups[layer.down.order].tolist() == [group for group in range(3) for _ in range(128)]


@pytest.fixture
def copied(tmp_path):
    """A function: a fixture's directory that may be changed."""
    return lambda name: copy_of(name, tmp_path)


def test_a_stored_quantized_head_is_the_head_though_the_config_ties_it(copied):
    folder = copied("ct-mixed")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    weights = find_model(str(folder)).load_weights(CPU, torch.float32)
    assert isinstance(weights.lm_head, Weight) and weights.lm_head.scheme.weight == "int8"


def test_act_order_of_compressed_tensors_is_read_too(copied):
    """llm-compressor wrote it until August 2026: `weight_g_idx` beside codes in the features' own order."""
    folder = copied("ct-w4a16")
    plain = find_model(str(folder)).load_weights(CPU, torch.float32).layers[0].down
    shuffled = torch.randperm(384, generator=torch.Generator().manual_seed(0))

    def shuffle(tensors):
        name = f"{LAYER}mlp.down_proj"
        codes = unpacked(tensors[f"{name}.weight_packed"].view(torch.uint8))[:, shuffled]
        tensors[f"{name}.weight_packed"] = packed(codes).view(torch.int32)
        tensors[f"{name}.weight_g_idx"] = (shuffled // 128).int()

    rewrite(folder, shuffle)
    found = find_model(str(folder)).load_weights(CPU, torch.float32).layers[0].down
    assert isinstance(found, Weight) and isinstance(plain, Weight) and found.order is not None
    assert not torch.equal(found.order, shuffled.argsort())
    dense = torch.empty(256, 384)
    dense[:, found.order] = dequantize(found, torch.float32)
    assert torch.equal(dense, dequantize(plain, torch.float32)[:, shuffled])


def test_blocks_that_end_within_a_product_mean_the_same(copied):
    folder = copied("deepseek-fp8")
    attention = f"{LAYER}self_attn."

    def halve(tensors):
        for name in ("k_proj", "v_proj"):
            tensors[f"{attention}{name}.weight"] = tensors[f"{attention}{name}.weight"][:64].clone()

    rewrite(folder, halve)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "head_dim": 64, "num_attention_heads": 4}))
    qkv = find_model(str(folder)).load_weights(CPU, torch.float32).layers[0].qkv
    assert isinstance(qkv, Weight) and qkv.scheme.group_n == 1
    stored = load_file(folder / "model.safetensors")
    parts = []
    for name in ("q_proj", "k_proj", "v_proj"):
        codes, scale = (stored[f"{attention}{name}.{suffix}"] for suffix in ("weight", "weight_scale_inv"))
        spread = scale.repeat_interleave(128, 0)[: len(codes)].repeat_interleave(128, 1)
        parts.append(codes.float() * spread)
    assert torch.equal(dequantize(qkv, torch.float32), torch.cat(parts))
