"""Checkpoints that the public tools wrote mean here what they mean there; damaged ones are one clear line.

`tools/quantized_fixtures.py` wrote the fixtures, and beside each the logits of the tool's own loading.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from backbench.backends.interface import Linear, Weight
from backbench.backends.interface.device import cpu
from backbench.backends.quantization import dequantize, product, rounded_rows
from backbench.backends.registry import select
from backbench.engine.limits import StepLimits
from backbench.engine.models.checkpoint import find_model
from backbench.engine.models.decoder import Decoder, attention_specs, whole_sequences
from backbench.errors import EngineError

CPU = torch.device("cpu")
FIXTURES = Path(__file__).parent / "fixtures"
NAMES = sorted(folder.name for folder in FIXTURES.iterdir())
LIMITS = StepLimits(block_size=16, max_len=64, max_seqs=1, max_step_tokens=64, prefill_chunk=64)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYER = "model.layers.0."


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


# Damage


@pytest.fixture
def copied(tmp_path):
    """A function: a fixture's directory that may be damaged."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(FIXTURES / name, tmp_path / "model"))

    return copy


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def refused(folder: Path) -> str:
    """The one line that loading says."""
    with pytest.raises(EngineError) as caught:
        find_model(str(folder)).load_weights(CPU, torch.float32)
    said = str(caught.value).replace(str(folder), "MODEL")
    assert said.isprintable() and len(said) < 300, said
    return said


def scale_name(name: str) -> str:
    """The scale of a linear that is quantized in every fixture."""
    suffix = {"ct": "weight_scale", "deepseek": "weight_scale_inv"}.get(name.split("-")[0], "scales")
    return f"{LAYER}mlp.up_proj.{suffix}"


def codes_name(name: str) -> str:
    stored = load_file(FIXTURES / name / "model.safetensors")
    linear = f"{LAYER}mlp.up_proj."
    return next(
        f"{linear}{each}" for each in ("weight_packed", "weight", "qweight") if linear + each in stored
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_scale_is_named(name, copied):
    folder = copied(name)
    rewrite(folder, lambda tensors: tensors.pop(scale_name(name)))
    assert (
        refused(folder)
        == f"The checkpoint MODEL lacks tensor {scale_name(name)}; it is not the model it says."
    )


@pytest.mark.parametrize("name", NAMES)
def test_another_group_than_the_config_s_is_named(name, copied):
    folder = copied(name)

    def one_too_many(tensors):
        scale = tensors[scale_name(name)]
        tensors[scale_name(name)] = torch.cat([scale, scale[:1]]).contiguous()

    rewrite(folder, one_too_many)
    said = refused(folder)
    assert scale_name(name) in said
    assert "; the config asks for [" in said or "must be one positive number" in said


def set_group(settings: dict[str, Any], size: int) -> bool:
    if "group_size" in settings:
        settings["group_size"] = size
        return True
    numbers = [group["weights"] for group in settings.get("config_groups", {}).values()]
    grouped = [each for each in numbers if each["strategy"] == "group"]
    for each in grouped:
        each["group_size"] = size
    return bool(grouped)


@pytest.mark.parametrize("name", ["ct-w4a16", "ct-w4a16-asym", "ct-w8a16", "gptq-w4", "gptq-w8", "awq-w4"])
def test_a_config_with_another_group_is_refused(name, copied):
    folder = copied(name)
    configure(folder, lambda settings: set_group(settings, 64))
    said = refused(folder)
    assert "; the config asks for [" in said or "are not 4 groups of 64, as the config says" in said


@pytest.mark.parametrize("name", NAMES)
def test_a_truncated_file_is_named(name, copied):
    folder = copied(name)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 3 // 4])
    said = refused(folder)
    assert (
        said.startswith("MODEL/model.safetensors is truncated or damaged") or "is missing, truncated" in said
    )


@pytest.mark.parametrize("name", NAMES)
def test_codes_of_another_dtype_are_named(name, copied):
    folder = copied(name)
    other = {1: torch.bool, 4: torch.float32}

    def reinterpret(tensors):
        codes = tensors[codes_name(name)]
        tensors[codes_name(name)] = codes.view(other[codes.element_size()])

    rewrite(folder, reinterpret)
    said = refused(folder)
    assert codes_name(name) in said and " is torch." in said and ", not " in said


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_method_is_named(name, copied):
    folder = copied(name)
    configure(folder, lambda settings: settings.update(quant_method="rot13"))
    assert refused(folder) == (
        "The checkpoint is quantized by the unknown method 'rot13', which is not read; "
        "awq, compressed-tensors, fp8, gptq are."
    )


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("modelopt", "NVIDIA's Model Optimizer"),
        ("quark", "AMD's Quark"),
        ("gguf", "llama.cpp"),
        ("bitsandbytes", "bitsandbytes"),
        ("torchao", "torchao"),
        ("exl3", "ExLlamaV3"),
    ],
)
def test_methods_that_are_known_and_not_read_are_named(method, said, copied):
    folder = copied("ct-w8a8")
    configure(folder, lambda settings: settings.update(quant_method=method))
    assert f"in '{method}', the format of {said}, which is not read" in refused(folder)


def test_weights_that_only_another_file_calls_quantized_are_not_taken_for_dense(copied):
    folder = copied("ct-w8a8")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "hf_quant_config.json").write_text("{}")
    assert "'modelopt', the format of NVIDIA's Model Optimizer" in refused(folder)


def test_a_gguf_file_is_named(tmp_path, copied):
    folder = copied("ct-w8a8")
    (folder / "model.safetensors").unlink()
    (folder / "model-q4.gguf").write_bytes(b"GGUF")
    assert (
        refused(folder) == "MODEL/model-q4.gguf is a GGUF file, which is not read; convert it to safetensors."
    )


@pytest.mark.parametrize("name", ["ct-fp8", "ct-mxfp8", "ct-w4a16", "deepseek-fp8", "gptq-w4"])
def test_a_scale_or_code_that_is_no_number_is_found(name, copied):
    folder = copied(name)

    def damage(tensors):
        for key in (scale_name(name), codes_name(name)):
            tensor = tensors[key]
            if tensor.dtype == torch.uint8 and "scale" in key:
                tensor.view(-1)[-1] = 255
            elif tensor.is_floating_point():
                tensor.view(-1)[-1] = float("nan")

    rewrite(folder, damage)
    said = refused(folder)
    assert f"{LAYER}mlp.up_proj" in said and ("NaN" in said or "positive number" in said)


@pytest.mark.parametrize("name", ["ct-w4a16", "gptq-w4", "awq-w4"])
def test_a_tensor_nobody_asked_for_is_named(name, copied):
    folder = copied(name)
    rewrite(folder, lambda tensors: tensors.update({f"{LAYER}mlp.up_proj.rotation": torch.eye(2)}))
    assert f"holds {LAYER}mlp.up_proj.rotation, which is unknown here" in refused(folder)


def test_a_bias_the_model_does_not_add_must_be_zero(copied):
    folder = copied("gptq-w4")
    name = f"{LAYER}mlp.up_proj.bias"
    rewrite(folder, lambda tensors: tensors.update({name: torch.zeros(384)}))
    find_model(str(folder)).load_weights(CPU, torch.float32)
    rewrite(folder, lambda tensors: tensors.update({name: torch.ones(384)}))
    assert f"{name} is not zero" in refused(folder)


def test_zero_points_where_the_config_says_there_are_none_are_refused(copied):
    folder = copied("gptq-w4-asym")
    configure(folder, lambda settings: settings.update(sym=True))
    assert "qzeros holds other zero points than the middle" in refused(folder)


def test_groups_that_are_no_groups_are_refused(copied):
    folder = copied("gptq-w4-act-order")
    rewrite(folder, lambda tensors: tensors[f"{LAYER}mlp.up_proj.g_idx"].fill_(1))
    assert "are not 2 groups of 128" in refused(folder)


def test_parts_of_a_product_that_cannot_be_joined_are_named(copied):
    folder = copied("ct-fp8")
    rewrite(folder, lambda tensors: tensors[f"{LAYER}mlp.up_proj.input_scale"].mul_(2))
    said = refused(folder)
    assert said.startswith(f"{LAYER}mlp.gate_proj and {LAYER}mlp.up_proj: Parts with a different input_scale")
