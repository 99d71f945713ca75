"""A quantized model is loaded without a dense copy of it, and without much beside itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch.profiler import ProfilerActivity, profile

from backbench.backends.interface import Weight
from backbench.backends.quantization import FP8
from backbench.engine.models.checkpoint import find_model
from backbench.engine.models.weights import Weights

HIDDEN, FFN, LAYERS, VOCAB = 1024, 2816, 6, 512
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
INT4 = {"num_bits": 4, "group_size": 128, "strategy": "group", "symmetric": False}
Tensors = dict[str, torch.Tensor]


def words(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)


def compressed(n: int, k: int) -> Tensors:
    return {
        "weight_packed": words(n, k // 8),
        "weight_scale": torch.ones(n, k // 128, dtype=torch.bfloat16),
        "weight_zero_point": words(n // 8, k // 128),
    }


def act_order(n: int, k: int) -> Tensors:
    order = torch.randperm(k, generator=torch.Generator().manual_seed(k))
    return {
        "qweight": words(k // 8, n),
        "qzeros": words(k // 128, n // 8),
        "scales": torch.ones(k // 128, n, dtype=torch.float16),
        "g_idx": (order // 128).int(),
    }


def awq(n: int, k: int) -> Tensors:
    scales = torch.ones(k // 128, n, dtype=torch.float16)
    return {"qweight": words(k, n // 8), "qzeros": words(k // 128, n // 8), "scales": scales}


def block_fp8(n: int, k: int) -> Tensors:
    weight = torch.zeros(n, k, dtype=torch.uint8).view(FP8)
    return {"weight": weight, "weight_scale_inv": torch.ones(-(-n // 128), -(-k // 128))}


FORMATS: dict[str, tuple[dict[str, object], Callable[[int, int], Tensors]]] = {
    "compressed-tensors": (
        {"format": "pack-quantized", "config_groups": {"all": {"targets": ["Linear"], "weights": INT4}}},
        compressed,
    ),
    "gptq": ({"bits": 4, "group_size": 128, "sym": False, "desc_act": True}, act_order),
    "awq": ({"bits": 4, "group_size": 128, "version": "gemm"}, awq),
    "fp8": ({"activation_scheme": "dynamic", "weight_block_size": [128, 128]}, block_fp8),
}


def write(folder, method: str) -> int:
    """A checkpoint of some 77 million parameters in this format; the bytes of its file."""
    settings, linear = FORMATS[method]
    (folder / "config.json").write_text(
        json.dumps({**CONFIG, "quantization_config": {"quant_method": method, **settings}})
    )
    found = {"model.embed_tokens.weight": torch.zeros(VOCAB, HIDDEN, dtype=torch.bfloat16)}
    found["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    for index in range(LAYERS):
        prefix = f"model.layers.{index}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{prefix}.{name}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
        shapes = {f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"}
        shapes |= {"mlp.gate_proj": (FFN, HIDDEN), "mlp.up_proj": (FFN, HIDDEN)}
        shapes["mlp.down_proj"] = (HIDDEN, FFN)
        for name, (n, k) in shapes.items():
            found |= {f"{prefix}.{name}.{suffix}": each for suffix, each in linear(n, k).items()}
    save_file(found, folder / "model.safetensors")
    return (folder / "model.safetensors").stat().st_size


def peak_bytes(load: Callable[[], Weights], file_bytes: int) -> tuple[Weights, int]:
    """What was loaded, and the most bytes of tensors that torch held at once; a mapped file is none."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        weights = load()
    events = [each for each in profiled.profiler.kineto_results.events() if each.name() == "[memory]"]
    held = peak = 0
    assert file_bytes in [event.nbytes() for event in events]
    for event in sorted(events, key=lambda each: each.start_ns()):
        held += event.nbytes() if abs(event.nbytes()) != file_bytes else 0
        peak = max(peak, held)
    return weights, peak


@pytest.mark.parametrize("method", FORMATS)
def test_the_peak_while_loading_is_the_model_and_one_layer(method, tmp_path):
    file_bytes = write(tmp_path, method)
    source = find_model(str(tmp_path))
    cpu = torch.device("cpu")
    weights, peak = peak_bytes(lambda: source.load_weights(cpu, torch.bfloat16), file_bytes)
    layers = [
        sum(each.num_bytes for each in vars(layer).values() if isinstance(each, Weight))
        for layer in weights.layers
    ]
    assert sum(layers) > 0.9 * weights.num_bytes
    assert weights.num_bytes <= peak <= weights.num_bytes + max(layers), (
        peak,
        weights.num_bytes,
        max(layers),
    )


def test_the_measurement_sees_a_dense_copy(tmp_path):
    file_bytes = write(tmp_path, "fp8")
    source = find_model(str(tmp_path))

    def load() -> Weights:
        weights = source.load_weights(torch.device("cpu"), torch.bfloat16)
        copies = [replace(layer.down, q=layer.down.q.to(torch.bfloat16)) for layer in weights.layers]
        assert len(copies) == LAYERS
        return weights

    weights, peak = peak_bytes(load, file_bytes)
    assert peak >= weights.num_bytes + 2 * LAYERS * HIDDEN * FFN
