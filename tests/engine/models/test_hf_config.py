"""Configs are read as transformers means them, and what cannot be computed is refused by name."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from backbench.engine.models.config import ModelConfig
from backbench.engine.models.families import families
from backbench.engine.models.fields import FIELDS, WithoutEffect
from backbench.engine.models.hf_config import ROPE_FIELDS, from_hf, read_json
from backbench.engine.models.rope import ROPE_KINDS, inverse_frequencies, rotary_table
from backbench.errors import EngineError

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
}
MISTRAL = {"architectures": ["MistralForCausalLM"]}
QWEN = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 9}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
FULL, SLIDING = "full_attention", "sliding_attention"


def read(**changes) -> ModelConfig:
    return from_hf({**BASE, **changes})


def test_new_and_old_rope_layouts_agree():
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 128
    new = read(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **scaling})
    old = read(rope_theta=5e5, rope_scaling={"type": "llama3", **scaling})
    assert new == old
    assert (new.rope.kind, new.rope.theta, new.rope.original_max_len) == ("llama3", 5e5, 128)
    same = {"rope_type": "linear", "factor": 2.0}
    assert read(rope_parameters=same, rope_scaling=dict(same)).rope.factor == 2.0


def test_defaults():
    config = read()
    assert (config.head_dim, config.tied_embeddings, config.dtype) == (16, False, torch.float32)
    assert config.windows == (None, None, None) and config.rms_norm_eps == 1e-6
    assert read(num_key_value_heads=None).kv_heads == 4


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_absent_fields_mean_what_the_class_says(model_type):
    """Everything but the sizes left out, beside transformers' own object of the same config."""
    theirs = AutoConfig.for_model(
        model_type,
        vocab_size=100,
        hidden_size=512,
        intermediate_size=96,
        num_hidden_layers=30,
        num_attention_heads=32,
        max_position_embeddings=512,
    )
    sizes = {"vocab_size": 100, "hidden_size": 512, "intermediate_size": 96, "num_hidden_layers": 30}
    sizes |= {"num_attention_heads": 32, "max_position_embeddings": 512}
    ours = from_hf({"model_type": model_type, **sizes})
    assert ours.kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == getattr(theirs, "head_dim", 512 // 32)
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.eos_token_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))
    assert ours.windows == (getattr(theirs, "sliding_window", None),) * 30
    if model_type.startswith("qwen"):
        windowed = from_hf({"model_type": model_type, **sizes, "use_sliding_window": True})
        assert windowed.windows == (None,) * 28 + (4096,) * 2


def test_declared_differences():
    assert read(architectures=["Qwen2ForCausalLM"]).qkv_bias
    assert read(architectures=["Qwen3ForCausalLM"]).qk_norm
    assert not read().qkv_bias and not read().qk_norm
    assert read(eos_token_id=[3, 4]).eos_token_ids == (3, 4)
    assert read(eos_token_id=None).eos_token_ids == ()
    assert read(dtype="bfloat16").dtype == read(torch_dtype="torch.bfloat16").dtype == torch.bfloat16
    assert read(architectures=None, model_type="qwen3") == read(architectures=["Qwen3ForCausalLM"])


def test_windows():
    assert read(**MISTRAL, sliding_window=9).windows == (9,) * 3
    assert read(**MISTRAL, sliding_window=9, layer_types=[SLIDING] * 3).windows == (9,) * 3
    assert read(**MISTRAL, sliding_window=None, layer_types=[FULL] * 3).windows == (None,) * 3
    assert read(sliding_window=None, layer_types=[FULL] * 3).windows == (None,) * 3
    assert read(**QWEN).windows == (None,) * 3
    assert read(**QWEN, use_sliding_window=True, max_window_layers=1).windows == (None, 9, 9)
    kinds = [SLIDING, FULL, FULL]
    assert read(**QWEN, use_sliding_window=True, layer_types=kinds).windows == (9, None, None)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rope_parameters": YARN}, 512),  # 4 * 64 is less than the config says
        ({"rope_parameters": YARN, "max_position_embeddings": 64}, 256),
        ({"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0}}, 2048),
        ({"rope_parameters": YARN, "original_max_position_embeddings": 200}, 800),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, 512),
    ],
)
def test_yarn_stretches_the_context(changes, expected):
    assert read(**changes).max_len == expected


def test_the_configs_own_original_context_overrules_that_of_the_rotary_settings():
    """As transformers' `standardize_rope_params`; the table is its own, too."""
    fields = {"rope_parameters": dict(YARN), "original_max_position_embeddings": 200, "head_dim": 16}
    config = read(**fields)
    assert config.rope.original_max_len == 200
    shape = {name: value for name, value in BASE.items() if name != "architectures"}
    theirs = AutoConfig.for_model("llama", **shape, **fields)
    cos, _ = LlamaRotaryEmbedding(theirs)(torch.zeros(1), torch.arange(300)[None])
    ours = rotary_table(config.rope, 16, torch.device("cpu"), 300).cos_sin[:, :8]
    torch.testing.assert_close(ours, cos[0, :, :8], atol=1e-4, rtol=0)


def test_fields_without_effect():
    assert read(
        _anything={"at": "all"},
        use_cache=False,
        attention_dropout=0.3,
        torch_dtype="bfloat16",
        transformers_version="9.9",
        temperature=0.6,
        id2label={"0": "a"},
    ) == read(dtype="bfloat16")


PUBLISHED = {
    # Which fields a config.json of this kind has beside the sizes: none may be refused by mistake.
    "Qwen/Qwen2.5-0.5B": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_window_layers": 24,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1e6,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1",
        "use_cache": True,
        "use_mrope": False,
        "use_sliding_window": False,
    },
    "meta-llama/Llama-3.2-1B": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": [1, 8, 9],
        "head_dim": 64,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "rope_type": "llama3",
            "original_max_position_embeddings": 8192,
        },
        "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0",
        "use_cache": True,
    },
    "HuggingFaceTB/SmolLM2-135M-Instruct": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "initializer_range": 0.04,
        "is_llama_config": True,
        "mlp_bias": False,
        "pad_token_id": 2,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "use_cache": True,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    },
    "NousResearch/Yarn-Llama-2-7b-64k": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "auto_map": {"AutoModelForCausalLM": "modeling_llama_together_yarn.LlamaForCausalLM"},
        "rope_scaling": {
            "factor": 16.0,
            "finetuned": True,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "_name_or_path": "models/llama-7b",
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read(name):
    config = read(**PUBLISHED[name])
    assert config.windows == (None,) * 3
    assert config.max_len == (65536 if "Yarn" in name else 512)


REFUSED = [
    (
        {"architectures": ["GPT2LMHeadModel"]},
        "Unknown architecture 'GPT2LMHeadModel'; known are LlamaForCausalLM, MistralForCausalLM, "
        "Qwen2ForCausalLM, Qwen3ForCausalLM.",
    ),
    ({"architectures": None}, "Unknown architecture None"),
    ({"architectures": "LlamaForCausalLM"}, "architectures must be a list of names"),
    ({"architectures": [{}]}, "Unknown architecture {}"),
    ({"model_type": "mistral"}, "model_type 'mistral' contradicts its architecture LlamaForCausalLM"),
    ({"model_type": 3}, "model_type a name"),
    ({"hidden_size": None}, "needs a positive integer 'hidden_size'; it has None"),
    ({"vocab_size": 100.0}, "needs a positive integer 'vocab_size'; it has 100.0"),
    ({"vocab_size": True}, "needs a positive integer 'vocab_size'; it has True"),
    ({"num_hidden_layers": 10**12}, "'num_hidden_layers' of 1000000000000; at most 10000 is served"),
    ({"hidden_size": 2**31}, "'hidden_size' of 2147483648"),
    ({"head_dim": 16.0}, "positive integer 'head_dim'; it has 16.0"),
    ({"head_dim": 15}, "head_dim must be even"),
    ({"hidden_size": 3}, "head_dim must be even"),
    ({"architectures": ["Qwen3ForCausalLM"], "head_dim": "big"}, "positive integer 'head_dim'; it has 'big'"),
    ({"rms_norm_eps": None}, "needs a positive number as 'rms_norm_eps'; it has None"),
    ({"rms_norm_eps": "1e-6"}, "positive number as 'rms_norm_eps'; it has '1e-6'"),
    ({"rms_norm_eps": math.nan}, "positive number as 'rms_norm_eps'; it has nan"),
    ({"rms_norm_eps": 10**400}, "positive number as 'rms_norm_eps'; it has 1000"),
    ({"num_key_value_heads": 3}, "4 attention heads do not divide among 3"),
    ({"tie_word_embeddings": "false"}, "true or false as 'tie_word_embeddings'; it has 'false'"),
    ({"eos_token_id": "</s>"}, "'eos_token_id'; it has '</s>'"),
    ({"eos_token_id": [1, "</s>"]}, "'eos_token_id'; it has '</s>'"),
    ({"hidden_act": "gelu"}, "hidden_act of 'gelu' is not served; only 'silu' or 'swish' is"),
    ({"attention_bias": True}, "attention_bias of True is not served"),
    ({"mlp_bias": True}, "mlp_bias of True is not served"),
    ({"is_causal": False}, "is_causal of False is not served; only True is"),
    ({"is_causal": None}, "is_causal of None"),
    ({"sliding_window": 9}, "sliding_window of 9 is not served"),
    ({"quantization_config": {"quant_method": "gptq"}}, "GPTQ weights of None bits are not read"),
    ({"quantization_config": {"quant_method": "rot13"}}, "unknown method 'rot13'"),
    ({"quantization_config": "gptq"}, "quantization_config must be an object; it is 'gptq'"),
    ({"logit_scale": 0.5}, "The config has 'logit_scale', which may change what the model computes"),
    ({"a" * 5000: 1}, "unknown here"),
    ({"\x1b[31m": 1}, r"The config has '\x1b[31m'"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor of 0.5"),
    ({"dtype": "float8_e4m3fn"}, "checkpoint in 'float8_e4m3fn'"),
    ({"dtype": {"text": "float16"}}, "is not served; use one in float32"),
    # windows
    ({**MISTRAL, "sliding_window": 9, "layer_types": [FULL, SLIDING, FULL]}, "names full_attention, but"),
    ({**MISTRAL, "layer_types": [FULL] * 3}, "with a sliding_window of 4096"),
    ({**MISTRAL, "sliding_window": None, "layer_types": [SLIDING] * 3}, "names sliding_attention, but"),
    ({**MISTRAL, "sliding_window": "wide"}, "positive integer 'sliding_window'; it has 'wide'"),
    ({"layer_types": [SLIDING] * 3}, "names sliding_attention, but"),
    ({**QWEN, "layer_types": [SLIDING] * 3}, "but use_sliding_window is false"),
    ({**QWEN, "layer_types": [FULL] * 2}, "must name 3 layers"),
    ({**QWEN, "layer_types": ["chunked_attention"] * 3}, "Layers of type 'chunked_attention'"),
    ({**QWEN, "use_sliding_window": 1}, "true or false as 'use_sliding_window'"),
    # rotary settings
    ({"rope_parameters": {"rope_type": "longrope"}}, "Unknown rope type 'longrope'; known are default"),
    ({"rope_parameters": {"rope_type": "linear"}}, "'linear' needs a 'factor'"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "'llama3' needs a 'low_freq_factor'"),
    ({"rope_parameters": {FULL: {"rope_type": "default"}}}, "differ by layer type"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": "4"}}, "positive number as 'factor'; it has '4'"),
    ({"rope_parameters": {**YARN, "long_factor": [1.0]}}, "'long_factor', which is not served"),
    ({"rope_parameters": YARN, "rope_scaling": {"type": "linear", "factor": 2.0}}, "different rope_scaling"),
    ({"rope_parameters": {**YARN, "partial_rotary_factor": 0.5}}, "partial_rotary_factor of 0.5"),
    ({"rope_parameters": {**YARN, "factor": 1e308}}, "at most 2147483647 is served"),
    ({"rope_parameters": {**YARN, "rope_theta": 1}}, "rope_theta must be above 1"),
    ({"rope_theta": "big"}, "positive number as 'rope_theta'; it has 'big'"),
    ({"rope_scaling": '{"type":"linear"}'}, "rope_scaling must be an object"),
    ({"rope_scaling": {"factor": 4.0}}, "name no rope_type"),
    ({"original_max_position_embeddings": "64"}, "'original_max_position_embeddings'; it has '64'"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=lambda value: str(value)[:50])
def test_what_cannot_be_computed_is_refused(changes, message):
    with pytest.raises(EngineError) as caught:
        read(**changes)
    said = str(caught.value)
    assert message in said and len(said) < 300 and said.isprintable()


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([0, 1, 2, 8, 1.5]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
MEANT = sorted(name for name, field in FIELDS.items() if not isinstance(field, WithoutEffect))
ROTARY = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(ROPE_KINDS), "factor": st.sampled_from([1.0, 4, 1e300])},
    optional=dict.fromkeys(sorted(ROPE_FIELDS - {"rope_type", "factor"}), JUNK),
)


@settings(max_examples=150, deadline=None)
@given(
    family=st.sampled_from(sorted(families())),
    changes=st.dictionaries(st.sampled_from(MEANT) | st.text(), JUNK, max_size=3),
    rope=st.none() | ROTARY,
)
def test_any_config_is_read_or_refused_in_one_line(family, changes, rope):
    base = {name: value for name, value in BASE.items() if name != "architectures"}
    try:
        config = from_hf({**base, "model_type": family, "rope_parameters": rope, **changes})
    except EngineError as error:
        said = str(error)
        assert len(said) < 300 and said.isprintable()
    else:
        assert len(config.windows) == config.num_layers and 0 < config.max_len < 2**31
        frequencies, scale = inverse_frequencies(config.rope, 16)
        assert frequencies.shape == (8,) and isinstance(scale, float)


NESTED = '{"a": ' + "[" * 20_000 + "]" * 20_000 + "}"


@pytest.mark.parametrize("text", ["{", NESTED, "[]", "\udc80", "1" * 5000], ids=lambda text: ascii(text)[:8])
def test_a_file_that_is_no_json_object_is_one_line(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(EngineError, match=r"cannot be read|must hold a JSON object") as caught:
        read_json(tmp_path / "config.json", "it")
    assert "\n" not in str(caught.value)
