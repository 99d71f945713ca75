"""Rounding and pruning while weights are loaded: what it makes, what it refuses, and what memory it takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from backbench.backends.interface import PackedWeight, Scheme, Weight
from backbench.backends.interface.device import cpu
from backbench.backends.quantization import SCHEMES, dequantize, quantize
from backbench.backends.torch.linear import TorchLinear
from backbench.engine import config as engine_config
from backbench.engine.calibration.recipe import Recipe
from backbench.engine.calibration.writing import write_quantized
from backbench.engine.config import EngineConfig
from backbench.engine.engine import Engine
from backbench.engine.models.checkpoint import DirectorySource, ModelSource, find_model
from backbench.engine.models.config import ModelConfig, RopeConfig
from backbench.engine.models.on_the_fly import OnTheFly, described, pruned
from backbench.engine.models.weights import random_weights
from backbench.engine.request import SamplingParams
from backbench.errors import EngineError

CPU = torch.device("cpu")
SETTINGS = [{"quantize": scheme} for scheme in ("int8", "fp8-block", "int4-g128", "nvfp4")]


def model(**changes) -> ModelConfig:
    sizes = {"vocab_size": 1024, "hidden_size": 512, "num_layers": 3, "ffn_size": 1536} | changes
    return ModelConfig(
        **{
            "architecture": "llama",
            "q_heads": 8,
            "kv_heads": 2,
            "head_dim": 64,
            "rms_norm_eps": 1e-6,
            "rope": RopeConfig(),
            "tied_embeddings": False,
            "qkv_bias": False,
            "qk_norm": False,
            "windows": (None,) * sizes["num_layers"],
            "max_len": 128,
            "eos_token_ids": (),
            "dtype": torch.float32,
            **sizes,
        }
    )


def asked(**settings) -> OnTheFly:
    found = OnTheFly.asked(EngineConfig(**settings))
    assert found is not None
    return found


def changed(config: ModelConfig, **settings) -> ModelConfig:
    return replace(config, on_the_fly=asked(**settings))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_weights_are_the_dense_ones_rounded(scheme: str) -> None:
    """The same random numbers, source by source, and nothing but the products changed."""
    config = model(num_layers=1)
    dense = random_weights(config, CPU, torch.float32)
    rounded = random_weights(changed(config, quantize=scheme), CPU, torch.float32)
    assert torch.equal(rounded.embedding, dense.embedding)
    assert rounded.lm_head.scheme == Scheme() and torch.equal(rounded.lm_head.q, dense.lm_head.q)
    for (role, one), (_, other) in zip(rounded.products(), dense.products(), strict=True):
        if role == "head":
            continue
        sources = next(p for p in config.spec.products if p.role == role).sources
        parts = [quantize(part, SCHEMES[scheme]) for part in other.q.split([rows for _, rows in sources])]
        wanted = torch.cat([dequantize(part, torch.float32) for part in parts])
        assert torch.equal(dequantize(one, torch.float32), wanted)


def test_sources_that_are_no_whole_blocks_are_rounded_as_one() -> None:
    config = model(num_layers=1, q_heads=4, kv_heads=1)
    weights = random_weights(changed(config, quantize="fp8-block"), CPU, torch.float32)
    dense = random_weights(config, CPU, torch.float32)
    wanted = dequantize(quantize(dense.layers[0].qkv.q, SCHEMES["fp8-block"]), torch.float32)
    assert torch.equal(dequantize(weights.layers[0].qkv, torch.float32), wanted)


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_of_its_own(tied: bool) -> None:
    config = model(tied_embeddings=tied)
    weights = random_weights(changed(config, quantize="int8", quantize_head=True), CPU, torch.float32)
    dense = random_weights(config, CPU, torch.float32)
    assert torch.equal(weights.embedding, dense.embedding)
    wanted = quantize(dense.lm_head.q, SCHEMES["int8"])
    assert torch.equal(weights.lm_head.q, wanted.q)
    products = [held for _, held in weights.products()]
    norms = 7 * 512 * 4
    assert weights.num_bytes == weights.embedding.nbytes + norms + sum(each.num_bytes for each in products)
    assert weights.streamed_bytes == weights.num_bytes - weights.embedding.nbytes


def test_a_tied_head_that_stays_dense_is_the_embedding() -> None:
    weights = random_weights(changed(model(tied_embeddings=True), quantize="int8"), CPU, torch.float32)
    assert weights.lm_head.q is weights.embedding
    assert weights.streamed_bytes == weights.num_bytes


class Live(TorchDispatchMode):
    """The most bytes of tensors that were there at once, as every operation left them."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor):
                storage = each.untyped_storage()
                self.held[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.held = {key: kept for key, kept in self.held.items() if not kept[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.held.values()))
        return result


class Rearranging(TorchLinear):
    """Packs into new tensors, as kernels with a layout of their own do."""

    def pack(self, weight, device):
        return replace(weight, q=weight.q.flip(0))

    def unpack(self, packed):
        return replace(packed, q=packed.q.flip(0))


@pytest.mark.parametrize("settings", [*SETTINGS, {"sparsity": "2:4"}], ids=str)
def test_no_dense_copy_is_ever_held(settings: dict[str, str]) -> None:
    """At most the quantized weights and one dense layer, from the first tensor to the last one packed."""
    config = model(num_layers=6)
    with Live() as live:
        weights = random_weights(changed(config, **settings), CPU, torch.float32)
        weights.pack(Rearranging(), cpu())
    layer = sum(each.parameters for each in config.spec.layers[0].products) * 4
    dense = config.weight_bytes(torch.float32)
    assert weights.num_bytes + layer < 0.8 * dense  # the bound means something
    assert weights.num_bytes < live.peak <= weights.num_bytes + layer
    with Live() as plain:
        random_weights(config, CPU, torch.float32)
    assert plain.peak >= dense


def test_packing_gives_the_canonical_weight_up() -> None:
    weights = random_weights(changed(model(), quantize="int8"), CPU, torch.float32)
    before, linear = weights.num_bytes, Rearranging()
    canonical = weights.layers[0].down
    weights.pack(linear, cpu())
    held = weights.layers[0].down
    assert isinstance(held, PackedWeight) and held.kept is None
    assert torch.equal(held.canonical().q, canonical.q)
    assert weights.num_bytes == before
    assert isinstance(weights.lm_head, Weight)


class Forgetful(Rearranging):
    def unpack(self, packed):
        return None


def test_a_weight_kept_beside_its_packed_form_is_held_and_not_read() -> None:
    config = changed(model(), quantize="int8")
    weights = random_weights(config, CPU, torch.float32)
    held, read = weights.num_bytes, weights.streamed_bytes
    weights.pack(Forgetful(), cpu())
    codes = sum(each.parameters for layer in config.spec.layers for each in layer.products)
    assert weights.num_bytes == held + codes
    assert weights.streamed_bytes == read


def test_pruning_to_two_of_four_keeps_the_larger() -> None:
    dense = torch.randn(40, 64)
    dense[3, :4] = 0.5  # equal magnitudes: exactly two stay
    sparse = pruned(dense, "2:4").view(-1, 4)
    assert bool(((sparse == 0).sum(1) == 2).all())
    kept, lost = sparse != 0, sparse == 0
    magnitude = dense.view(-1, 4).abs()
    smallest_kept = magnitude.masked_fill(lost, torch.inf).amin(1)
    assert bool((smallest_kept >= magnitude.masked_fill(kept, 0).amax(1)).all())
    assert torch.equal(sparse[kept], dense.view(-1, 4)[kept])


@pytest.mark.parametrize(("sparsity", "zeros"), [("unstructured:0.7", 70), ("unstructured:.255", 25)])
def test_pruning_a_share_of_every_row(sparsity: str, zeros: int) -> None:
    dense = torch.randn(7, 100)
    sparse = pruned(dense, sparsity)
    assert (sparse == 0).sum(1).tolist() == [zeros] * 7
    for row, whole in zip(sparse, dense, strict=True):
        assert whole[row == 0].abs().max() <= whole[row != 0].abs().min()


def test_sparse_weights_are_rounded_after_they_are_pruned() -> None:
    config = changed(model(num_layers=1), quantize="int4-g128", sparsity="2:4")
    weight = random_weights(config, CPU, torch.float32).layers[0].gate_up
    assert weight.scheme == replace(SCHEMES["int4-g128"], sparsity="2:4")
    assert bool(((dequantize(weight, torch.float32).view(-1, 4) == 0).sum(1) >= 2).all())


@pytest.mark.parametrize("tied", [False, True])
def test_two_of_four_without_rounding_are_kept_compressed(tied: bool) -> None:
    """0.5625 of the dense bytes in bf16, product by product, queries, keys and values as one."""
    config = model(num_layers=1, tied_embeddings=tied)
    dense = random_weights(config, CPU, torch.bfloat16)
    sparse = random_weights(changed(config, sparsity="2:4", quantize_head=True), CPU, torch.bfloat16)
    assert torch.equal(sparse.embedding, dense.embedding)
    for (role, held), (_, whole) in zip(sparse.products(), dense.products(), strict=True):
        assert held.scheme == Scheme(sparsity="2:4"), role
        assert held.num_bytes == 0.5625 * whole.num_bytes, role
        assert torch.equal(dequantize(held, torch.bfloat16), pruned(whole.q, "2:4")), role


def test_unstructured_zeros_without_rounding_are_dense_weights() -> None:
    config = model(num_layers=1)
    weight = random_weights(changed(config, sparsity="unstructured:0.5"), CPU, torch.float32).layers[0].down
    assert weight.scheme.dense and weight.num_bytes == 4 * 512 * 1536
    assert bool(((weight.q == 0).sum(1) == 768).all())


def test_zeros_of_rounded_weights_are_codes_like_any_other() -> None:
    config = model(num_layers=1)
    sparse = random_weights(changed(config, quantize="int8", sparsity="2:4"), CPU, torch.float32)
    plain = random_weights(changed(config, quantize="int8"), CPU, torch.float32)
    assert sparse.num_bytes == plain.num_bytes


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        (
            {"ffn_size": 1440},
            {"quantize": "int4-g128"},
            r"model\.layers\.0\.mlp\.down_proj cannot be int4-g128: 1440 input features do not divide into "
            "groups of 128",
        ),
        ({"ffn_size": 1444}, {"sparsity": "2:4"}, r"down_proj cannot be 2:4: 1444 .* eights"),
        ({"ffn_size": 1442}, {"sparsity": "2:4", "quantize": "int8"}, r"down_proj .*: 1442 .* fours"),
        ({}, {"quantize_head": True}, "--quantize-head needs --quantize or --sparsity"),
    ],
)
def test_what_cannot_be_is_one_line(changes: dict, settings: dict, message: str) -> None:
    with pytest.raises(EngineError, match=message) as raised:
        _ = changed(model(**changes), **settings).spec
    assert len(str(raised.value)) < 300


def test_a_quantized_checkpoint_is_not_rounded_again() -> None:
    spec = model().spec.with_products(lambda product: replace(product, scheme=SCHEMES["int4-g128"]))
    with pytest.raises(EngineError, match=r"quantized already \(int4-g128\); leave out --quantize"):
        asked(quantize="int8").put_on(spec)


@pytest.mark.parametrize("given", ["4:2", "unstructured", "unstructured:1", "unstructured:0", "x", ""])
def test_sparsity_is_checked(given: str) -> None:
    with pytest.raises(EngineError, match="--sparsity takes 2:4 or unstructured:SHARE"):
        EngineConfig(sparsity=given)


def test_the_names_are_those_of_the_schemes() -> None:
    assert ("none", *SCHEMES) == engine_config.SCHEMES
    assert OnTheFly.asked(EngineConfig(quantize="none", quantize_head=True)) is None


def test_a_model_says_how_it_is_kept() -> None:
    config = model()
    assert config.quantization is None
    assert changed(config, quantize="int4-g128").quantization == "int4-g128"
    assert changed(config, quantize="int8", quantize_head=True).quantization == "int8, head too"
    assert changed(config, sparsity="2:4").quantization == "2:4"
    assert changed(config, quantize="fp8", sparsity="2:4").quantization == "fp8 2:4"
    mixed = config.spec.with_products(
        lambda each: replace(each, scheme=SCHEMES["int8" if each.role == "down" else "nvfp4"])
    )
    assert described(mixed) == "nvfp4: qkv, attention_output, gate_up; int8: down"


def test_the_engine_serves_it_and_says_so() -> None:
    source = find_model("tiny")
    config = EngineConfig(quantize="int4-g32", max_seqs=2, num_blocks=8)
    engine = Engine.open(source, backend="torch", device=cpu(), config=config)
    assert {spec.role: spec.scheme for spec in engine.selection.weights} == dict.fromkeys(
        ("qkv", "attention_output", "gate_up", "down"), SCHEMES["int4-g32"]
    ) | {"head": Scheme()}
    assert engine.memory()["weights_bytes"] == 6_358_528 == engine.memory()["weights_read_bytes"]
    assert source.config.quantization is None  # nothing of the source has changed


def generated(source: ModelSource, **settings: Any) -> list[list[int]]:
    """Tokens of three prompts, greedy and in fp32."""
    config = EngineConfig(max_seqs=4, max_len=96, num_blocks=32, **settings)
    engine = Engine.open(source, backend="torch", device=cpu(), dtype=torch.float32, config=config)
    for index in range(3):
        prompt = [(7 * index + 3 * place) % 250 for place in range(5 + 9 * index)]
        engine.add_request(str(index), prompt, SamplingParams(24, ignore_eos=True))
    found: dict[str, list[int]] = {str(index): [] for index in range(3)}
    while engine.has_work:
        for token in engine.step():
            found[token.request_id].append(token.token_id)
    return list(found.values())


def test_tokens_are_those_of_the_dense_pruned_weights(tmp_path: Path) -> None:
    """A checkpoint with the same zeros and dense weights; and what is pruned already loses nothing more."""
    tiny = find_model("tiny")
    assert isinstance(tiny, DirectorySource)
    write_quantized(tiny, tmp_path / "pruned", Recipe(Scheme(sparsity="2:4")), cpu())
    dense = find_model(str(tmp_path / "pruned"))
    tokens = generated(tiny, sparsity="2:4")
    assert [len(each) for each in tokens] == [24] * 3
    assert tokens == generated(dense) == generated(dense, sparsity="2:4")
    assert tokens != generated(tiny)
