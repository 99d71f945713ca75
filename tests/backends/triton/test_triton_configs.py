"""The shipped tables, and what the backend says about the shapes they lack."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from backbench.backends.composite import CompositeAttention
from backbench.backends.interface import AttentionSpec, Crossover, Device, Scheme, WeightSpec
from backbench.backends.interface.device import cpu
from backbench.backends.quantization import SCHEMES
from backbench.backends.torch.attention import TorchAttention
from backbench.backends.triton import configs
from backbench.backends.triton.attention import TritonAttention, TritonRunner
from backbench.backends.triton.linear import TritonLinear
from backbench.backends.tuning.table import Entry

H200 = Device("nvidia", "sm90", "H200", 132, 2**37, 227 * 1024, torch.device("cpu"))
SPEC = AttentionSpec(32, 8, 128, torch.bfloat16, torch.bfloat16, 64, 128**-0.5)
FILES = sorted(configs.FOLDER.glob("*.json"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_no_shipped_entry_is_stale(file: Path) -> None:
    """A kernel's text changed: tune again, or where only words changed, write the new hash into the table."""
    arch, units = file.stem.rsplit("-", 1)
    table = configs.table(arch, int(units))
    assert table.entries
    stale = {
        f"{entry.operation}: {entry.sources} is now {configs.sources_of(entry.operation, entry.config)}"
        for entry in table.entries.values()
        if entry.sources != configs.sources_of(entry.operation, entry.config)
    }
    assert not stale


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_products_by_quantized_weights_stand_beside_the_dense_one(file: Path) -> None:
    arch, units = file.stem.rsplit("-", 1)
    for entry in configs.table(arch, int(units)).entries.values():
        beside = entry.operation in ("packed_gemm", "byte_gemm", "sparse_gemm")
        assert (entry.us is not None) == (entry.dense_us is not None) == beside, entry


def test_up_to_how_many_rows_a_quantized_weight_is_faster() -> None:
    def crossover(scheme: Scheme, n: int, k: int, device: Device = H200) -> Crossover | None:
        return TritonLinear().crossover(replace(product(n, k, torch.bfloat16), scheme=scheme), device)

    packed = SCHEMES["int4-g128"]
    gate_up = crossover(packed, 24576, 4096)
    assert gate_up is not None and (gate_up.faster_up_to, gate_up.slower_from) == (128, 256)
    assert gate_up.beyond == "tile kernel 128x128, dequantized"
    down = crossover(packed, 4096, 12288)
    assert down is not None and (down.faster_up_to, down.slower_from) == (256, 1024)
    assert crossover(SCHEMES["fp8"], 28672, 4096) == Crossover(8192, None)
    assert crossover(packed, 24576, 4104) is crossover(Scheme(), 24576, 4096) is None
    assert crossover(packed, 24576, 4096, replace(H200, units=114)) is None
    assert crossover(packed, 24576, 4096, cpu(interpret=True)) is None


def test_a_way_that_serves_twice_is_said_twice() -> None:
    """512 rows of this shape were not measured."""
    spec = replace(product(24576, 4096, torch.bfloat16), scheme=SCHEMES["int4-g128"])
    said = TritonLinear().served_by(spec, H200)
    assert said.endswith(
        "tile kernel 128x128 to 256 rows; dequantized to 512 rows; tile kernel 128x128 to 1024 rows; "
        "dequantized to 8192 rows"
    )


def product(n: int, k: int, dtype: torch.dtype) -> WeightSpec:
    return WeightSpec("gate_up", n, k, Scheme(), dtype)


def test_the_models_of_the_published_rows_are_tuned() -> None:
    for block_size in (16, 64):
        for q_heads in (16, 32):
            layer = replace(SPEC, block_size=block_size, q_heads=q_heads)
            found = TritonAttention().tuning(layer, H200)
            assert found is not None
            assert len(found) == len(configs.ATTENTION_BUCKETS)
            assert set(found.values()) == {None}
    for n, k in ((6144, 4096), (24576, 4096), (1024, 3072), (151936, 1024)):
        products = TritonLinear().tuning(product(n, k, torch.bfloat16), H200)
        assert products is not None
        assert set(products.values()) == {None}


def test_other_shapes_and_devices_are_said_to_be_untuned() -> None:
    products = TritonLinear().tuning(product(4096, 4104, torch.bfloat16), H200)
    assert products is not None
    assert set(products.values()) == {"no entry for sm90-132"}
    wide = TritonAttention().tuning(replace(SPEC, q_heads=256), H200)
    assert wide is not None
    assert set(wide.values()) == {"no entry for sm90-132"}
    elsewhere = TritonAttention().tuning(SPEC, replace(H200, arch="gfx942", units=304))
    assert elsewhere is not None
    assert set(elsewhere.values()) == {"no entry for gfx942-304"}


def test_there_is_nothing_to_tune_without_a_gpu_or_in_true_fp32() -> None:
    assert TritonAttention().tuning(SPEC, cpu(interpret=True)) is None
    assert TritonLinear().tuning(product(64, 64, torch.bfloat16), cpu(interpret=True)) is None
    assert TritonLinear().tuning(product(6144, 4096, torch.float32), H200) is None


def test_a_mix_speaks_for_both_sides() -> None:
    mixed = CompositeAttention(TorchAttention(), TritonAttention())
    assert mixed.tuning(SPEC, H200) == TritonAttention().tuning(SPEC, H200)
    assert CompositeAttention(TorchAttention(), TorchAttention()).tuning(SPEC, H200) is None


def test_an_entry_replaces_what_the_rule_says(monkeypatch: pytest.MonkeyPatch) -> None:
    operation, bucket, dtype = configs.entry_key(SPEC, "decode")
    faster = Entry(operation, bucket, dtype, configs.sources(operation), {"TILE": 32, "num_warps": 2})
    table = configs.table("sm90", 132).merged([faster])
    monkeypatch.setattr(configs, "table", lambda arch, units: table)
    expected = configs.written_attention(H200, SPEC, "decode") | {"TILE": 32, "num_warps": 2}
    assert configs.attention_config(H200, SPEC, "decode") == expected
    monkeypatch.setattr(configs, "sources", lambda operation: "another text")
    assert configs.attention_config(H200, SPEC, "decode") == configs.written_attention(H200, SPEC, "decode")
    found = TritonAttention().tuning(SPEC, H200)
    assert found is not None
    assert all(re.search("other kernel sources", why or "") for why in found.values())


def test_an_fp8_cache_is_a_dtype_of_its_own() -> None:
    small = replace(SPEC, kv_dtype=torch.float8_e4m3fn)
    assert configs.entry_key(small, "prefill")[2] == "bfloat16 on float8_e4m3fn"
    half = replace(small, dtype=torch.float16)
    assert configs.complaint("sm90", 132, *configs.entry_key(half, "prefill")) == "no entry for sm90-132"


def test_an_int8_cache_is_a_dtype_of_its_own_whose_scales_take_room() -> None:
    small = replace(SPEC, kv_dtype=torch.int8)
    assert configs.entry_key(small, "prefill")[2] == "bfloat16 on int8"
    assert configs.key_bytes(small) == 2 * (128 + 4)
    assert small.kv_bytes_per_token == 8 * configs.key_bytes(small)


@pytest.mark.parametrize(
    ("group", "bucket", "stages"), [(2, "decode", 4), (4, "decode", 3), (2, "decode_small", 3)]
)
def test_no_third_program_of_drafts_fits_beside_two(group: int, bucket: str, stages: int) -> None:
    """Programs of few rows have one stage more: three would not fit the H200's shared memory."""
    spec = replace(SPEC, q_heads=8 * group, kv_heads=8)
    config = configs.attention_config(H200, spec, bucket)
    members = TritonRunner(spec, replace(H200, torch_device=torch.device("meta"))).members
    found = configs.drafts(H200, spec, config, members)
    assert found["STAGES"] == stages
    tiles = found["TILE"] * configs.key_bytes(spec) * (stages - 1)
    assert tiles * found["programs_per_unit"] < H200.shared_bytes
    if members == 16:
        assert tiles * (found["programs_per_unit"] + 1) > H200.shared_bytes
