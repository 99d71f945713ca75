"""The quantized checkpoints of `tests/engine/models/fixtures`, which `tools/quantized_fixtures.py` wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

FIXTURES = Path(__file__).parent / "models" / "fixtures"
NAMES = sorted(folder.name for folder in FIXTURES.iterdir())
LAYER = "model.layers.0."


def copy_of(name: str, folder: Path) -> Path:
    """A fixture's directory that may be changed, under `folder`."""
    return Path(shutil.copytree(FIXTURES / name, folder / "model"))


def rewrite(folder: Path, change) -> None:
    """Apply `change` to the dictionary of tensors in the folder's file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder: Path, change) -> None:
    """Apply `change` to the quantization_config of the folder's config.json."""
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
