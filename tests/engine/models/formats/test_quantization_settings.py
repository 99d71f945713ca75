"""What the config's quantization_config may say: read, or refused by name in one line."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given
from transformers import AwqConfig, FineGrainedFP8Config, GPTQConfig

from backbench.backends.interface import Scheme
from backbench.engine.models.formats import formats, schemes_of
from backbench.errors import EngineError

FIXTURES = Path(__file__).parent.parent / "fixtures"
SETTINGS = {
    folder.name: json.loads((folder / "config.json").read_text())["quantization_config"]
    for folder in sorted(FIXTURES.iterdir())
}
DOWN = "model.layers.0.mlp.down_proj"
INT4, TOKEN = Scheme("int4", group=128), "fp8-token"


def schemes(settings: dict[str, Any]):
    found = schemes_of({"quantization_config": settings})
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("ct-w4a16", INT4),
        ("ct-w4a16-asym", Scheme("int4", group=128, zero_point=True)),
        ("ct-w8a16", Scheme("int8", group=128)),
        ("ct-w8a8", Scheme("int8", activation="int8-token")),
        ("ct-w8a8-static", Scheme("int8", activation="int8-tensor")),
        ("ct-fp8", Scheme("fp8", activation="fp8-tensor")),
        ("ct-fp8-dynamic", Scheme("fp8", activation=TOKEN)),
        ("ct-fp8-block", Scheme("fp8", group=128, group_n=128, activation="fp8-group128")),
        ("deepseek-fp8", Scheme("fp8", group=128, group_n=128, activation="fp8-group128")),
        ("ct-nvfp4a16", Scheme("fp4", group=16, scale="e4m3")),
        ("ct-nvfp4", Scheme("fp4", group=16, scale="e4m3", activation="nvfp4")),
        ("ct-mxfp4a16", Scheme("fp4", group=32, scale="e8m0")),
        ("ct-mxfp4", Scheme("fp4", group=32, scale="e8m0", activation="mxfp4")),
        ("ct-mxfp8", Scheme("fp8", group=32, scale="e8m0", activation="mxfp8")),
        ("gptq-w4", INT4),
        ("gptq-w4-act-order", INT4),
        ("gptq-v2-w4-asym", Scheme("int4", group=128, zero_point=True)),
        ("gptq-w8", Scheme("int8", group=32)),
        ("awq-w4", Scheme("int4", group=128, zero_point=True)),
    ],
)
def test_every_format_s_scheme(name, scheme):
    found = schemes(SETTINGS[name])
    assert found.of(DOWN) == scheme
    assert found.of("lm_head").dense


@pytest.mark.parametrize(
    "written", [AwqConfig(), GPTQConfig(bits=4), FineGrainedFP8Config()], ids=lambda each: type(each).__name__
)
def test_what_transformers_writes_by_default_is_read(written):
    settings = json.loads(written.to_json_string(use_diff=False))
    assert not schemes(settings).of(DOWN).dense


AUTOGPTQ = {
    "bits": 4,
    "group_size": -1,
    "damp_percent": 0.1,
    "desc_act": True,
    "static_groups": False,
    "sym": True,
    "true_sequential": True,
    "model_name_or_path": None,
    "quant_method": "gptq",
}
AUTOAWQ = {
    "backend": "autoawq",
    "bits": 4,
    "do_fuse": False,
    "exllama_config": None,
    "group_size": 64,
    "fuse_max_seq_len": None,
    "modules_to_fuse": None,
    "modules_to_not_convert": None,
    "quant_method": "awq",
    "version": "GEMM",
    "zero_point": True,
}
EARLY_COMPRESSED = {
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "group_size": -1, "symmetric": True, "type": "int"},
        }
    },
    "format": "pack-quantized",
    "ignore": ["lm_head"],
    "quantization_status": "frozen",
    "quant_method": "compressed-tensors",
    "sparsity_config": {"format": "dense"},
}


@pytest.mark.parametrize(
    ("settings", "scheme"),
    [
        (AUTOGPTQ, Scheme("int4")),
        (AUTOAWQ, Scheme("int4", group=64, zero_point=True)),
        (EARLY_COMPRESSED, Scheme("int8")),
    ],
)
def test_what_older_writers_say_is_read(settings, scheme):
    assert schemes(settings).of(DOWN) == scheme


def test_methods_are_the_files_of_the_folder():
    assert sorted(str(each.method) for each in formats()) == [
        *("None", "awq", "compressed-tensors", "fp8", "gptq"),
    ]
    assert schemes_of({}) is None and schemes_of({"quantization_config": {}}) is None


def test_names_come_before_expressions_and_those_before_classes():
    settings = copy.deepcopy(SETTINGS["ct-mixed"])
    groups = settings["config_groups"]
    groups["group_1"]["targets"] = ["Linear"]
    groups["group_0"]["targets"] = ["re:.*mlp.*"]
    groups["group_2"]["targets"] = ["model.layers.1.mlp.down_proj"]
    found = schemes(settings)
    assert found.of("model.layers.0.self_attn.q_proj").weight == "fp8"
    assert found.of("model.layers.0.mlp.up_proj").weight == "int4"
    assert found.of("model.layers.1.mlp.down_proj").weight == "int8"
    assert found.of(DOWN).dense


def group(**changes: Any) -> dict[str, Any]:
    """compressed-tensors settings, its one group's `weights` changed; "group.x" changes the group itself."""
    settings = copy.deepcopy(SETTINGS["ct-w4a16"])
    (only,) = settings["config_groups"].values()
    for name, value in changes.items():
        (only if name in only else only["weights"])[name] = value
    return settings


def activations(**changes: Any) -> dict[str, Any]:
    settings = copy.deepcopy(SETTINGS["ct-fp8-dynamic"])
    (only,) = settings["config_groups"].values()
    only["input_activations"].update(changes)
    return settings


def changed(name: str, **changes: Any) -> dict[str, Any]:
    return {**SETTINGS[name], **changes}


REFUSED = [
    (changed("ct-w4a16", kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme is not served"),
    (changed("ct-w4a16", transform_config={"config_groups": {}}), "transform_config is not served"),
    (changed("ct-w4a16", sparsity_config={"format": "sparse-24-bitmask"}), "'sparse-24-bitmask'"),
    (changed("ct-w4a16", quantization_status="calibration"), "quantization_status 'calibration' is not read"),
    (changed("ct-w4a16", rotation="hadamard"), "has 'rotation', which may change"),
    (changed("ct-w4a16", config_groups=[]), "config_groups must be an object of objects"),
    (
        changed("ct-w4a16", config_groups={"a": {"targets": "Linear"}}),
        "targets must be a list of names; it is 'Linear'",
    ),
    (changed("ct-w4a16", ignore=1), "ignore must be a list of names; it is 1"),
    (group(num_bits=3), "Weights of 3-bit int by group are not read"),
    (group(num_bits=[4]), "weights have a num_bits of [4]"),
    (group(strategy="attn_head", group_size=None), "Weights of 4-bit int by attn_head are not read"),
    (group(group_size=None), "weights by group have a group_size of None"),
    (group(group_size=0), "have a group_size of 0"),
    (group(strategy="block", group_size=None), "by block have a block_structure of None"),
    (group(dynamic=True), "cannot be dynamic"),
    (group(bits=4), "weights has 'bits', which may change"),
    (group(format="int-quantized"), "in the format 'int-quantized' are not read; pack-quantized is"),
    (group(output_activations={"num_bits": 8}), "output_activations is not served"),
    (group(weights=None), "weights must be an object; it is None"),
    (group(type="float", group_size=64), "Weights of 4-bit float by group of 64 are not read"),
    (group(targets=["re:(["]), "'([', which is no regular expression"),
    (activations(strategy="tensor"), "Activations of 8-bit float by tensor, dynamic, are not served"),
    (activations(symmetric=False), "by token, dynamic, with zero points, are not served"),
    (activations(type="int", num_bits=4), "Activations of 4-bit int by token"),
    (changed("deepseek-fp8", weight_block_size=None), "weight_block_size = None are not read"),
    (
        changed("deepseek-fp8", activation_scheme="static"),
        "activation_scheme = 'static' are not read; only 'dynamic' is",
    ),
    (changed("deepseek-fp8", scale_fmt="ue8m0"), "scale_fmt = 'ue8m0' are not read; only 'float' is"),
    (changed("deepseek-fp8", modules_to_not_convert="lm_head"), "must be a list of names"),
    (changed("deepseek-fp8", hadamard=True), "has 'hadamard'"),
    (changed("gptq-w4", bits=3), "GPTQ weights of 3 bits are not read; 4 and 8 are"),
    (changed("gptq-w4", checkpoint_format="marlin"), "in the format 'marlin' are not read"),
    (changed("gptq-w4", checkpoint_format="gptq_p"), "in the format 'gptq_p' are not read"),
    (changed("gptq-w4", lm_head=True), "lm_head = True are not read"),
    (changed("gptq-w4", group_size=0), "group_size of 0 are not read"),
    (changed("gptq-w4", sym="yes"), "sym of 'yes' are not read"),
    (changed("gptq-w4", adapter={}), "has 'adapter'"),
    (changed("gptq-w4", dynamic={"+:.*": {"adapter": {}}}), "dynamic has 'adapter'"),
    (changed("gptq-w4", dynamic=[1]), "dynamic must be an object"),
    (changed("awq-w4", bits=8), "AWQ weights with bits = 8 are not read"),
    (changed("awq-w4", version="gemv"), "in the layout 'gemv' are not read; gemm is"),
    (changed("awq-w4", group_size="all"), "group_size of 'all'"),
    ({"load_in_4bit": True}, "in 'bitsandbytes', the format of bitsandbytes"),
    ({"bits": 4}, "by the unknown method None"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_is_not_read_is_named(settings, message):
    with pytest.raises(EngineError) as caught:
        schemes_of({"quantization_config": settings})
    said = str(caught.value)
    assert message in said and len(said) < 300 and said.isprintable(), said


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-200, 200) | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=9), inner, max_size=2),
    max_leaves=4,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of a JSON value that something else may be put in."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    inner = [place for key, each in items for place in places(each, (*path, key))]
    return [path, *inner] if path else inner


@given(st.data())
def test_whatever_the_settings_say_they_are_read_or_refused_in_one_line(data):
    settings = copy.deepcopy(data.draw(st.sampled_from(list(SETTINGS.values()))))
    *path, last = data.draw(st.sampled_from(places(settings)))
    inner = settings
    for key in path:
        inner = inner[key]
    inner[last] = data.draw(JSON)
    try:
        found = schemes_of({"quantization_config": settings})
    except EngineError as error:
        assert str(error).isprintable() and len(str(error)) < 300
    else:
        assert found is None or isinstance(found.of(DOWN), Scheme)
