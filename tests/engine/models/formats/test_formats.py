"""Checkpoint formats are found by being in the folder, and recognised by what a directory holds."""

from __future__ import annotations

import pytest

from backbench.engine.models.formats import format_of, formats, require_format
from backbench.engine.models.formats.dense import INDEX, SINGLE, DenseFormat, weight_files
from backbench.errors import EngineError


@pytest.mark.parametrize("file", [SINGLE, INDEX])
def test_dense_is_recognised_by_its_files(tmp_path, file):
    assert format_of(tmp_path) is None
    (tmp_path / file).write_text("{}")
    assert isinstance(format_of(tmp_path), DenseFormat)


def test_other_weights_are_not(tmp_path):
    (tmp_path / "consolidated.safetensors").write_text("")
    with pytest.raises(EngineError, match=r"no weights that are served: model\.safetensors, or shards"):
        require_format(tmp_path)


def test_every_file_of_the_folder_is_a_format():
    assert sorted(type(each).__name__ for each in formats()) == [
        *("AwqGemm", "BlockFp8", "CompressedTensors", "DenseFormat", "Gptq"),
    ]


def test_the_files_of_the_weights(tmp_path):
    assert weight_files(tmp_path) == [SINGLE]
    (tmp_path / INDEX).write_text('{"weight_map": {"b": "2.safetensors", "a": "1.safetensors"}}')
    assert weight_files(tmp_path) == ["1.safetensors", "2.safetensors"]
