"""Damaged quantized checkpoints, and those that are not read, are one clear line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_checkpoints import FIXTURES, LAYER, NAMES, configure, copy_of, rewrite
from safetensors.torch import load_file

from backbench.engine.models.checkpoint import find_model
from backbench.errors import EngineError

CPU = torch.device("cpu")


@pytest.fixture
def copied(tmp_path):
    """A function: a fixture's directory that may be changed."""
    return lambda name: copy_of(name, tmp_path)


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


@pytest.mark.parametrize("name", ["model.norm", f"{LAYER}mlp.down_proj"])
def test_dense_tensors_of_another_shape_are_named(name, copied):
    folder = copied("ct-mixed")
    rewrite(folder, lambda tensors: tensors.update({f"{name}.weight": torch.ones(1)}))
    assert f"Tensor {name}.weight in MODEL/model.safetensors has shape [1]" in refused(folder)


def test_zero_points_of_a_symmetric_weight_must_be_zero(copied):
    folder = copied("ct-w8a8")
    name = f"{LAYER}mlp.up_proj.weight_zero_point"
    rewrite(folder, lambda tensors: tensors.update({name: torch.zeros(384, 1, dtype=torch.int8)}))
    find_model(str(folder)).load_weights(CPU, torch.float32)
    rewrite(folder, lambda tensors: tensors.update({name: torch.ones(384, 1, dtype=torch.int8)}))
    assert f"{name} is not zero" in refused(folder)


def test_parts_of_a_product_that_cannot_be_joined_are_named(copied):
    folder = copied("ct-fp8")
    rewrite(folder, lambda tensors: tensors[f"{LAYER}mlp.up_proj.input_scale"].mul_(2))
    said = refused(folder)
    assert said.startswith(f"{LAYER}mlp.gate_proj and {LAYER}mlp.up_proj: Parts with a different input_scale")
