"""Checkpoints load tensor by tensor, and every bad one names what is at fault in one line."""

from __future__ import annotations

import json

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from backbench.backends.interface.device import cpu
from backbench.engine.config import EngineConfig
from backbench.engine.engine import Engine
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


def test_a_shape_is_checked_before_memory_is_taken(folder):
    """A config of 2^31 - 1 tokens would ask for a quarter of a terabyte."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 2**31 - 1}))
    refuses(folder, "model.embed_tokens.weight", "[50, 32]", "[2147483647, 32]")


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
    refuses(folder, "holds no weights that are served: model.safetensors, or shards with")


@pytest.mark.parametrize("content", ["{", "{}", '{"weight_map": 3}', '{"weight_map": {}}'])
def test_bad_index(folder, content):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)
    refuses(folder, "model.embed_tokens.weight" if content.endswith("{}}") else "index.json cannot be read")


def test_both_a_single_file_and_an_index(folder):
    """An index that names the single file is one set of weights; any other may be a second."""
    names = load_file(folder / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    assert load(folder).num_bytes > 0
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}))
    refuses(folder, "holds both model.safetensors and an index of other files")


@pytest.mark.parametrize(
    "file",
    ["../model.safetensors", "/etc/model.safetensors", "a/../../b.safetensors", "..\\b.safetensors", "x.bin"],
)
def test_an_index_that_leaves_the_directory(folder, file):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": file}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refuses(folder, "no safetensors file of this directory")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.self_attn.v_proj.weight"])
def test_a_weight_that_is_not_finite_is_named(folder, name, value):
    rewrite(folder, lambda tensors: tensors[name].view(-1)[-1:].fill_(value))
    refuses(folder, name, "holds NaN or infinity in float32 (stored in float32)")


def test_a_weight_beyond_the_dtype_is_named(folder):
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(folder, lambda tensors: tensors[name].view(-1)[:1].fill_(1e5))
    assert load(folder).num_bytes > 0
    with pytest.raises(EngineError, match=r"up_proj\.weight .* in float16 \(stored in float32\)"):
        load(folder, torch.float16)


def test_yarns_context_can_be_used_whole(tmp_path):
    """64 tokens stretched by 4: 256 are served, 257 are not."""
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    AutoModelForCausalLM.from_config(small_config(rope_parameters=yarn)).save_pretrained(tmp_path)

    def opened(max_len):
        config = EngineConfig(max_len=max_len, max_seqs=1, num_blocks=20)
        return Engine.open(find_model(str(tmp_path)), backend="torch", device=cpu(), config=config)

    assert opened(256).config.max_len == opened(None).config.max_len == 256
    with pytest.raises(EngineError, match="max_len 257 exceeds the model's context of 256"):
        opened(257)


@pytest.mark.parametrize("different", [False, True])
def test_a_stored_head_that_differs_is_not_tied(tmp_path, different):
    """As transformers does: both are stored and differ, so they are two tensors whatever the config says."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(small_config(tie_word_embeddings=True)).save_pretrained(tmp_path)
    head = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"].clone()
    head[3, 5] += different
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": head}))
    weights, config = load(tmp_path), find_model(str(tmp_path)).config
    assert config.tied_embeddings is not different
    assert weights.num_bytes == config.weight_bytes(torch.float32)
    assert weights.streamed_bytes == config.streamed_weight_bytes(torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(weights.lm_head.q, theirs.lm_head.weight)
    assert torch.equal(weights.embedding, theirs.model.embed_tokens.weight)


def test_bad_config(folder):
    (folder / "config.json").write_text("{")
    refuses(folder, "config.json cannot be read")
    (folder / "config.json").write_text("[]")
    refuses(folder, "must hold a JSON object")
    (folder / "config.json").write_text('{"architectures": ' + "[" * 20_000 + "]" * 20_000 + "}")
    refuses(folder, "config.json cannot be read: it is nested too deeply")
    (folder / "config.json").unlink()
    refuses(folder, "has no config.json")


def test_generation_config_decides_where_to_stop(folder):
    assert find_model(str(folder)).config.eos_token_ids == (7,)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 7]}))
    assert find_model(str(folder)).config.eos_token_ids == (3, 7)
    (folder / "generation_config.json").write_text("{}")
    assert find_model(str(folder)).config.eos_token_ids == (7,)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": "</s>"}))
    refuses(folder, "'eos_token_id'; it has '</s>'")


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


@pytest.mark.parametrize("place", [0, -1])
def test_the_fingerprint_covers_both_ends_of_a_file(folder, monkeypatch, place):
    monkeypatch.setattr(checkpoint, "EDGE_BYTES", 64)
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    before = find_model(str(folder)).revision
    data[place] ^= 1
    file.write_bytes(data)
    assert find_model(str(folder)).revision != before


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
    asked = []

    def download(repository, *, revision, allow_patterns, ignore_patterns=None):
        asked.append((repository, revision, allow_patterns, ignore_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    source = find_model("owner/model@v1.0")
    assert isinstance(source, DirectorySource) and source.revision == folder.name
    (first, weights) = asked
    assert first == ("owner/model", "v1.0", checkpoint.HUB_FILES, checkpoint.HUB_FOLDERS)
    assert weights == ("owner/model", folder.name, ["model.safetensors"], None)

    def offline(*args, **kwargs):
        raise OSError("no network\nand more lines")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(EngineError, match=r"nor to be had from the hub: no network$"):
        find_model("owner/model")


@pytest.mark.parametrize("sharded", [False, True])
def test_a_hub_repository_that_keeps_its_weights_twice_is_taken_once(tmp_path, monkeypatch, sharded):
    """As mistralai's do: consolidated.safetensors beside the shards, and other precisions in folders."""
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    ours = ["model.safetensors.index.json", *shards] if sharded else ["model.safetensors"]
    others = ["consolidated.safetensors", "original/consolidated.00.pth", "original/params.json"]
    others += ["fp16/model.safetensors", "model.fp16.safetensors", "pytorch_model.bin", "onnx/config.json"]
    repository = ["config.json", "tokenizer.json", "tokenizer.model.v3", *ours, *others]
    taken = []

    def download(name, *, revision, allow_patterns, ignore_patterns=None):
        taken.extend(
            filter_repo_objects(repository, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        )
        if "model.safetensors.index.json" in taken:
            index = {"weight_map": dict(zip(("a", "b"), shards, strict=True))}
            (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    find_model("owner/model")
    assert sorted(taken) == sorted(["config.json", "tokenizer.json", "tokenizer.model.v3", *ours])


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
    assert layer.attention_output.q.std().item() == pytest.approx(0.01, rel=0.05)
    assert source.describe()["revision"] == "random"
