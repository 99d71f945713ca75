"""`tiny-draft` with a second layer: calibration goes from layer to layer, and the bundled one has one."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

from safetensors.torch import load_file, save_file

from backbench.engine.models.checkpoint import BUNDLED, DirectorySource

FIRST, SECOND = "model.layers.0.", "model.layers.1."


@cache
def two_layers() -> DirectorySource:
    """The second layer has the first one's values in another order."""
    folder = Path(tempfile.mkdtemp()) / "two-layers"
    atexit.register(shutil.rmtree, folder.parent)
    shutil.copytree(BUNDLED / "tiny-draft", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    tensors = load_file(folder / "model.safetensors")
    second = {
        name.replace(FIRST, SECOND): tensor.flip(0).contiguous()
        for name, tensor in tensors.items()
        if name.startswith(FIRST)
    }
    save_file(tensors | second, folder / "model.safetensors", metadata={"format": "pt"})
    return DirectorySource("tiny-draft", folder)
