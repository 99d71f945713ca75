"""Checkpoints load tensor by tensor, and every bad one names what is at fault in one line."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from backbench.engine.models import checkpoint
from backbench.engine.models.checkpoint import DirectorySource, find_model, model_names
from backbench.errors import EngineError

CPU = torch.device("cpu")


def small_config(**changes):
    return Qwen2Config(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=7,
        **changes,
    )


@pytest.fixture
def folder(tmp_path):
    """A saved Qwen2 model of two layers."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(small_config()).save_pretrained(tmp_path)
    return tmp_path


def load(folder, dtype=torch.float32):
    return find_model(str(folder)).load_weights(CPU, dtype)


def rewrite(folder, change):
    """Apply `change` to the dictionary of tensors in the folder's file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refuses(folder, *parts):
    with pytest.raises(EngineError) as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def test_tensors_are_fused_in_order(folder):
    weights, saved = load(folder), load_file(folder / "model.safetensors")
    prefix = "model.layers.1."
    layer = weights.layers[1]
    names = ("q_proj", "k_proj", "v_proj")
    stacked = torch.cat([saved[f"{prefix}self_attn.{name}.weight"] for name in names])
    assert torch.equal(layer.qkv.q, stacked)
    biases = torch.cat([saved[f"{prefix}self_attn.{name}.bias"] for name in names])
    assert layer.qkv_bias is not None and torch.equal(layer.qkv_bias, biases)
    gate_up = [saved[f"{prefix}mlp.{name}.weight"] for name in ("gate_proj", "up_proj")]
    assert torch.equal(layer.gate_up.q, torch.cat(gate_up))
    assert torch.equal(weights.lm_head.q, saved["lm_head.weight"])


def test_number_of_bytes_and_dtype(folder):
    config = find_model(str(folder)).config
    assert load(folder).num_bytes == config.weight_bytes(torch.float32)
    half = load(folder, torch.bfloat16)
    assert half.num_bytes == config.weight_bytes(torch.bfloat16)
    assert half.embedding.dtype == torch.bfloat16


def test_tied_head_is_the_embedding(tmp_path):
    AutoModelForCausalLM.from_config(small_config(tie_word_embeddings=True)).save_pretrained(tmp_path)
    weights = load(tmp_path)
    assert weights.lm_head.q is weights.embedding
    assert weights.num_bytes == find_model(str(tmp_path)).config.weight_bytes(torch.float32)


def test_sharded_checkpoint_equals_the_single_file(folder, tmp_path):
    single = load(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    sharded = tmp_path / "sharded"
    model.save_pretrained(sharded, max_shard_size="10KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    for one, other in zip(single.tensors(), load(sharded).tensors(), strict=True):
        assert torch.equal(one, other)
    next(iter(sorted(sharded.glob("model-*.safetensors")))).unlink()
    refuses(sharded, "lm_head.weight", "model-00001-of-", "missing, truncated or damaged")


def test_missing_tensor(folder):
    name = "model.layers.1.mlp.down_proj.weight"
    rewrite(folder, lambda tensors: tensors.pop(name))
    refuses(folder, "lacks tensor", name)


def test_wrong_shape(folder):
    name = "model.layers.0.self_attn.k_proj.weight"
    rewrite(folder, lambda tensors: tensors.update({name: torch.zeros(15, 32)}))
    refuses(folder, name, "[15, 32]", "[16, 32]")


def test_wrong_dtype(folder):
    name = "model.norm.weight"
    rewrite(folder, lambda tensors: tensors.update({name: torch.zeros(32, dtype=torch.int8)}))
    refuses(folder, name, "torch.int8")


@pytest.mark.parametrize("keep", [0, 5, 200, -100])
def test_truncated_file(folder, keep):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:keep])
    refuses(folder, "model.safetensors", "truncated or damaged")


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    refuses(folder, "holds no model.safetensors")


@pytest.mark.parametrize("content", ["{", "{}", '{"weight_map": 3}', '{"weight_map": {}}'])
def test_bad_index(folder, content):
    (folder / "model.safetensors.index.json").write_text(content)
    refuses(folder, "model.embed_tokens.weight" if content.endswith("{}}") else "index.json cannot be read")


def test_bad_config(folder):
    (folder / "config.json").write_text("{")
    refuses(folder, "config.json cannot be read")
    (folder / "config.json").write_text("[]")
    refuses(folder, "must hold a JSON object")
    (folder / "config.json").unlink()
    refuses(folder, "has no config.json")


def test_generation_config_decides_where_to_stop(folder):
    assert find_model(str(folder)).config.eos_token_ids == (7,)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 7]}))
    assert find_model(str(folder)).config.eos_token_ids == (3, 7)


def test_tokenizer(folder):
    source = find_model(str(folder))
    assert not source.has_tokenizer
    with pytest.raises(EngineError, match="has no tokenizer"):
        source.tokenizer()
    plain = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=plain).save_pretrained(folder)
    assert source.has_tokenizer and source.tokenizer().convert_ids_to_tokens([1]) == ["b"]
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(EngineError, match="cannot be read") as caught:
        source.tokenizer()
    assert "\n" not in str(caught.value)


def test_describe_follows_config_and_weights(folder):
    before = find_model(str(folder)).describe()
    assert before["num_parameters"] == find_model(str(folder)).config.num_parameters
    assert find_model(str(folder)).describe() == before
    rewrite(folder, lambda tensors: tensors["model.norm.weight"].mul_(2))
    after = find_model(str(folder)).describe()
    assert after["revision"] != before["revision"] and after["config_hash"] == before["config_hash"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shape:qwen3-8", "Unknown shape 'qwen3-8'; did you mean .*qwen3-8b"),
        ("shape:qwen3-8bb", "did you mean qwen3-8b"),
        ("qwen3-8b", "Unknown model 'qwen3-8b'; did you mean shape:qwen3-8b"),
        ("nothing like it", "give a directory or a hub id"),
    ],
)
def test_unknown_names_give_the_nearest(name, message):
    with pytest.raises(EngineError, match=message):
        find_model(name)


def test_hub_download_and_its_failures(folder, monkeypatch):
    asked = {}

    def download(repository, *, revision, allow_patterns):
        asked.update(repository=repository, revision=revision, patterns=allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    source = find_model("owner/model@v1.0")
    assert isinstance(source, DirectorySource) and source.revision == folder.name
    assert (asked["repository"], asked["revision"]) == ("owner/model", "v1.0")
    assert "*.bin" not in asked["patterns"]

    def offline(*args, **kwargs):
        raise OSError("no network\nand more lines")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(EngineError, match=r"nor to be had from the hub: no network$"):
        find_model("owner/model")


def test_bundled_names_are_known(folder, monkeypatch):
    monkeypatch.setattr(checkpoint, "BUNDLED", folder.parent)
    assert folder.name in model_names() and "shape:qwen3-8b" in model_names()
    assert find_model(folder.name).config.vocab_size == 50


def test_random_shapes_are_repeatable(monkeypatch):
    small = {**checkpoint.SHAPES["qwen3-0.6b"], "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
    monkeypatch.setitem(checkpoint.SHAPES, "small", {**small, "intermediate_size": 48})
    source = find_model("shape:small")
    one, other = (source.load_weights(CPU, torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.tensors(), other.tensors(), strict=True))
    layer = one.layers[1]
    assert torch.equal(layer.attention_norm, torch.ones(32)) and layer.q_norm is not None
    assert layer.qkv.q.std().item() == pytest.approx(0.02, rel=0.05)
    assert layer.output.q.std().item() == pytest.approx(0.01, rel=0.05)
    assert source.describe()["revision"] == "random"
