import importlib.util
import json
from pathlib import Path

import pytest

from backbench.workloads import packed
from backbench.workloads.readers.azure import read_azure
from backbench.workloads.readers.mooncake import read_mooncake

SCRIPT = Path(__file__).parents[2] / "tools" / "pack_traces.py"


@pytest.fixture
def pack():
    spec = importlib.util.spec_from_file_location("pack_traces", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_mooncake(path: Path, chains: list[list[int]]) -> Path:
    rows = [
        {"timestamp": 3000 * index, "input_length": 512 * len(ids) - 5, "output_length": 9, "hash_ids": ids}
        for index, ids in enumerate(chains)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_packing_loses_nothing(pack, tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "DATA", tmp_path)
    source = tmp_path / "azure.csv"
    source.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:46.6805901,9,8\n2023-11-16 18:19:00,1,2\n"
    )
    pack.pack_azure(source, tmp_path / "azure-conv.npz")
    assert list(packed.packed_azure("azure-conv")) == list(read_azure(source))
    source = write_mooncake(tmp_path / "m.jsonl", [[0, 1, 2], [0, 3], [4], [0, 1, 2], [0, 1, 5, 6]])
    pack.pack_mooncake(source, tmp_path / "mooncake.npz")
    assert list(packed.packed_mooncake()) == list(read_mooncake(source))
    source = tmp_path / "lengths.csv"
    source.write_text("num_prefill_tokens,num_decode_tokens,num_total_tokens\n74,918,992\n1,2,3\n")
    pack.pack_sharegpt_lengths(source, tmp_path / "sharegpt-lengths.npz")
    assert packed.packed_sharegpt_lengths().tolist() == [[74, 918], [1, 2]]


@pytest.mark.parametrize("chains", [[[0, 1], [1]], [[0, 2]], [[0, 1], [2, 1]]])
def test_ids_that_the_packed_form_cannot_hold_are_refused(pack, tmp_path, chains):
    source = write_mooncake(tmp_path / "m.jsonl", chains)
    with pytest.raises(SystemExit, match="block id"):
        pack.pack_mooncake(source, tmp_path / "mooncake.npz")


def test_values_that_do_not_fit_are_refused(pack, tmp_path):
    source = tmp_path / "lengths.csv"
    source.write_text("num_prefill_tokens,num_decode_tokens\n70000,1\n")
    with pytest.raises(SystemExit, match="do not fit"):
        pack.pack_sharegpt_lengths(source, tmp_path / "out.npz")
