"""The models that need no path, for a list of them: plain data, so that listing imports no torch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backbench.engine.models.presets import SHAPES

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"
PUBLISHED_PARAMETERS = {
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "llama-2-7b": 6_738_415_616,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-7b": 7_615_616_512,
}
"""Shape -> parameters of the checkpoint that was published with it (its safetensors headers' sum)."""


@dataclass(frozen=True)
class Listed:
    """A model as `bench models` shows it."""

    name: str
    architecture: str
    parameters: int
    layers: int
    context: int
    """In tokens."""
    weights: str
    """ "bundled", or "random" for a shape."""


def listed_models() -> list[Listed]:
    """Every model that needs no download: the bundled ones, then the shapes."""
    found = []
    for file in sorted(CHECKPOINTS.glob("*/config.json")):
        config = json.loads(file.read_text(encoding="utf-8"))
        found.append(_listed(file.parent.name, config, stored_parameters(file.parent), "bundled"))
    for shape, config in SHAPES.items():
        found.append(_listed(f"shape:{shape}", config, PUBLISHED_PARAMETERS[shape], "random"))
    return found


def stored_parameters(folder: Path) -> int:
    """The values in a checkpoint's weight files, from their headers.

    A header is its length in 8 bytes, little-endian, and JSON: https://github.com/huggingface/safetensors
    """
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        total += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return total


def _listed(name: str, config: dict[str, Any], parameters: int, weights: str) -> Listed:
    return Listed(
        name=name,
        architecture=config["architectures"][0].removesuffix("ForCausalLM").lower(),
        parameters=parameters,
        layers=config["num_hidden_layers"],
        context=config["max_position_embeddings"],
        weights=weights,
    )
