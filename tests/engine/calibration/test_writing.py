"""Checkpoints that are written here are read here as what was rounded, and nothing half written is left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from two_layers import two_layers

from backbench.backends.interface import Scheme, Weight
from backbench.backends.interface.device import cpu
from backbench.backends.quantization import SCHEMES, dequantize, quantize
from backbench.engine.calibration import writing
from backbench.engine.calibration.recipe import Recipe
from backbench.engine.calibration.writing import write_quantized
from backbench.engine.models.checkpoint import DirectorySource
from backbench.errors import EngineError

CPU = torch.device("cpu")
ROLES = ("qkv", "attention_output", "gate_up", "down")


def draft() -> DirectorySource:
    return two_layers()


def written(out: Path, scheme: Scheme, **settings) -> DirectorySource:
    recipe = Recipe(scheme, **settings)
    write_quantized(draft(), out, recipe, cpu(), sequences=SEQUENCES if recipe.calibrated else ())
    return DirectorySource(out.name, out)


SEQUENCES = torch.randint(0, 4096, (4, 32), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("head", [False, True])
def test_what_is_read_is_what_was_rounded(tmp_path: Path, name: str, head: bool) -> None:
    source, scheme = written(tmp_path / "out", SCHEMES[name], head=head), SCHEMES[name]
    # Keys and values of 64 rows are no whole blocks of 128: together they are read with a scale a row.
    products = [each for each in source.config.spec.products if each.role not in ("qkv", "head")]
    assert {each.scheme for each in products} == {scheme}
    assert source.config.spec.head.scheme == (scheme if head else Scheme())
    dense = draft().load_weights(CPU, torch.bfloat16)
    found = source.load_weights(CPU, torch.bfloat16)
    rows = {each.role: [size for _, size in each.sources] for each in source.config.spec.products}
    for (role, held), (_, before) in zip(found.products(), dense.products(), strict=True):
        assert isinstance(held, Weight) and isinstance(before, Weight)
        kept = scheme if head or role != "head" else Scheme()
        # Blocks of rows end where a linear ends; NVFP4's global scale is one for all rows of a product.
        parts = before.q.split(rows[role]) if scheme.group_n > 1 else (before.q,)
        expected = torch.cat([dequantize(quantize(part, kept), torch.float32) for part in parts])
        # The inverse of an inverse is an fp32 bit off, for NVFP4's global scale.
        bits = 3e-7 if name == "nvfp4" else 0.0
        assert torch.allclose(dequantize(held, torch.float32), expected, rtol=bits, atol=0), role
    assert torch.equal(found.embedding, dense.embedding)
    assert torch.equal(found.layers[1].ffn_norm, dense.layers[1].ffn_norm)


def test_products_that_run_at_once_share_nvfp4_s_global_scale(tmp_path: Path) -> None:
    written(tmp_path / "out", SCHEMES["nvfp4"])
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for layer in range(2):
        attention = [
            stored[f"model.layers.{layer}.self_attn.{name}_proj.weight_global_scale"]
            for name in ("q", "k", "v")
        ]
        assert len({float(each) for each in attention}) == 1


@pytest.mark.parametrize("sparsity", ["2:4", "unstructured:0.7"])
@pytest.mark.parametrize(("scheme", "method"), [("none", "rtn"), ("int4-g32", "rtn"), ("int4-g32", "gptq")])
def test_zeros_are_where_they_should_be(tmp_path: Path, sparsity: str, scheme: str, method: str) -> None:
    kept = Scheme(sparsity=sparsity) if scheme == "none" else Scheme("int4", group=32, sparsity=sparsity)
    source = written(tmp_path / "out", kept, method=method, sparsity_method="wanda")
    for layer in source.load_weights(CPU, torch.bfloat16).layers:
        for role in ROLES:
            held = getattr(layer, role)
            zero = dequantize(held, torch.float32) == 0
            if sparsity == "2:4":
                assert int(zero.view(-1, 4).sum(1).min()) >= 2, role
            else:
                assert int(zero.sum(1).min()) >= int(0.7 * zero.shape[1]), role
            assert not bool(zero.all(1).any()), role


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_calibrated_weights_are_others_than_the_nearest(tmp_path: Path, method: str) -> None:
    source = written(tmp_path / "out", SCHEMES["int4-g32"], method=method, head=True)
    plain = written(tmp_path / "plain", SCHEMES["int4-g32"], head=True)
    found, other = source.load_weights(CPU, torch.float32), plain.load_weights(CPU, torch.float32)
    changed = set()
    for (role, one), (_, two) in zip(found.products(), other.products(), strict=True):
        assert isinstance(one, Weight) and isinstance(two, Weight)
        changed |= set() if torch.equal(one.q, two.q) else {role}
    # Where no scale of AWQ helps, there is none.
    assert changed >= ({*ROLES, "head"} if method == "gptq" else {"qkv", "gate_up", "down"})
    assert torch.equal(found.final_norm, other.final_norm) == (method == "gptq")


def test_several_files_and_what_stands_beside_them(tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    size = write_quantized(
        draft(), out, Recipe(SCHEMES["int8"]), cpu(), made={"model": "x"}, shard_bytes=300_000
    )
    names = sorted(file.name for file in out.iterdir())
    shards = [name for name in names if name.endswith(".safetensors")]
    assert len(shards) >= 3 and shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert {"config.json", "tokenizer.json", "generation_config.json", "quantize.json"} <= set(names)
    assert json.loads((out / "quantize.json").read_text()) == {"model": "x"}
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == size
    one = written(tmp_path / "one", SCHEMES["int8"]).load_weights(CPU, torch.float32)
    several = DirectorySource("several", out).load_weights(CPU, torch.float32)
    for a, b in zip(one.tensors(), several.tensors(), strict=True):
        assert torch.equal(a, b)


def test_an_error_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "_write_config", fails)
    with pytest.raises(OSError, match="No space"):
        written(tmp_path / "out", SCHEMES["int8"])
    assert list(tmp_path.iterdir()) == []


def test_a_directory_with_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("x")
    with pytest.raises(EngineError, match="is not empty"):
        written(tmp_path, SCHEMES["int8"])
    with pytest.raises(EngineError, match="is no directory"):
        written(tmp_path / "kept", SCHEMES["int8"])
    assert (tmp_path / "kept").read_text() == "x"
    (tmp_path / "empty").mkdir()
    assert written(tmp_path / "empty", SCHEMES["int8"]).config.quantization == "int8"


def test_a_quantized_model_is_refused(tmp_path: Path) -> None:
    source = written(tmp_path / "out", SCHEMES["int8"])
    with pytest.raises(EngineError, match=r"quantized already \(int8\); give the dense model"):
        write_quantized(source, tmp_path / "again", Recipe(SCHEMES["int8"]), cpu())
    assert not (tmp_path / "again").exists()
