"""Finding a model by name, and loading its config, weights and tokenizer."""

from __future__ import annotations

import difflib
import glob
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from copy import copy
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from backbench.engine.models.config import ModelConfig
from backbench.engine.models.formats import format_of, require_format
from backbench.engine.models.formats.dense import weight_files
from backbench.engine.models.hf_config import eos_token_ids, first_line, from_hf, read_json
from backbench.engine.models.layers import ALL_LAYERS, WHOLE, ModelSpec, Shard, Stage
from backbench.engine.models.on_the_fly import OnTheFly
from backbench.engine.models.presets import SHAPES
from backbench.engine.models.weights import Weights, random_weights
from backbench.errors import EngineError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUNDLED = Path(__file__).parent.parent / "checkpoints"
SHAPE_PREFIX = "shape:"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
HUB_FILES = ["*.json", "tokenizer*", "*.model", "*.txt"]
"""What is downloaded first; the weight files follow, as the index names them."""
HUB_FOLDERS = ["*/*"]
"""Never downloaded unless the index names them: other formats and precisions of the same weights."""
EDGE_BYTES = 2**20
"""Bytes at either end of a weight file that its fingerprint covers."""


class ModelSource(ABC):
    """Where a model comes from. Reading the config is cheap; weights are loaded when asked for."""

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    @abstractmethod
    def hf_config(self) -> Mapping[str, Any]:
        """The config in Hugging Face layout."""

    @property
    @abstractmethod
    def revision(self) -> str:
        """What identifies the weights: a hub commit, a fingerprint of the files, or the seed."""

    @property
    def has_tokenizer(self) -> bool:
        """True where `tokenizer` can succeed."""
        return False

    @abstractmethod
    def load_weights(
        self, device: torch.device, dtype: torch.dtype, shard: Shard = WHOLE, stage: Stage = ALL_LAYERS
    ) -> Weights:
        """The weights on `device` in `dtype`, or what one device has: a shard of each, or a stage's alone.

        Raises EngineError naming the tensor that is at fault.
        """

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer; raises EngineError where it has none."""
        raise EngineError(f"Model {self.name} has no tokenizer; use token ids, or a model that has one.")

    @cached_property
    def config(self) -> ModelConfig:
        """The model's shape; raises EngineError where this engine cannot compute it."""
        return from_hf(self.hf_config)

    def on_the_fly(self, change: OnTheFly | None) -> ModelSource:
        """The same model, its products changed while they are loaded; None = as they are."""
        found = copy(self)
        vars(found)["config"] = replace(self.config, on_the_fly=change)  # where cached_property keeps it
        return found

    def describe(self) -> dict[str, Any]:
        """What the record says about the model."""
        config = self.config
        canonical = json.dumps(self.hf_config, sort_keys=True).encode()
        return {
            "name": self.name,
            "revision": self.revision,
            "config_hash": hashlib.sha256(canonical).hexdigest(),
            "architecture": config.architecture,
            "dtype": str(config.dtype).removeprefix("torch."),
            "quantization": config.quantization,
            "num_parameters": config.num_parameters,
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "num_layers": config.num_layers,
            "q_heads": config.q_heads,
            "kv_heads": config.kv_heads,
            "head_dim": config.head_dim,
            "ffn_size": config.ffn_size,
            "max_len": config.max_len,
            "window": next((window for window in config.windows if window is not None), None),
            "tied_embeddings": config.tied_embeddings,
        }


class ShapeSource(ModelSource):
    """A known shape with random weights."""

    def __init__(self, shape: str) -> None:
        super().__init__(SHAPE_PREFIX + shape)
        if shape not in SHAPES:
            raise EngineError(f"Unknown shape {shape!r}; {_nearest(shape, list(SHAPES))}.")
        self.shape = shape

    @property
    def hf_config(self) -> Mapping[str, Any]:
        return SHAPES[self.shape]

    @cached_property
    def config(self) -> ModelConfig:
        """As the base class; random weights mean nothing by the class default of an end of sequence."""
        return replace(from_hf(self.hf_config), eos_token_ids=())

    @property
    def revision(self) -> str:
        return "random"

    def load_weights(
        self, device: torch.device, dtype: torch.dtype, shard: Shard = WHOLE, stage: Stage = ALL_LAYERS
    ) -> Weights:
        return random_weights(self.config, device, dtype, shard, stage)


class DirectorySource(ModelSource):
    """A checkpoint directory in Hugging Face layout: config.json and *.safetensors."""

    def __init__(self, name: str, path: Path, revision: str | None = None) -> None:
        super().__init__(name)
        self.path = path
        self._revision = revision

    @cached_property
    def hf_config(self) -> Mapping[str, Any]:
        return read_json(self.path / "config.json", self.name)

    @cached_property
    def config(self) -> ModelConfig:
        """As the base class, with what other files overrule.

        generation_config.json overrules the end-of-sequence ids. A stored head that differs from the
        embedding overrules `tie_word_embeddings`, as in transformers (`PreTrainedModel.tie_weights`).
        """
        config = from_hf(self.hf_config)
        generation = self.path / "generation_config.json"
        if generation.exists():
            ids = eos_token_ids(read_json(generation, self.name).get("eos_token_id"))
            config = replace(config, eos_token_ids=ids or config.eos_token_ids)
        if config.tied_embeddings and self._has_own_head(config.spec):
            config = replace(config, tied_embeddings=False)
        return config

    def _has_own_head(self, spec: ModelSpec) -> bool:
        """True where the head is stored beside the embedding and differs from it."""
        (embedding, _), (head, _) = spec.embedding.sources[0], spec.head.sources[0]
        weights = format_of(self.path)
        if weights is None:
            return False
        names, schemes = weights.names(self.path), from_hf(self.hf_config).schemes
        if schemes is not None and not schemes.of(head.removesuffix(".weight")).dense:
            # A quantized head may be the embedding rounded; what is stored is what is multiplied by.
            return any(name.startswith(head.removesuffix("weight")) for name in names)
        if not {embedding, head} <= names:
            return False
        return weights.differ(self.path, embedding, head)

    @cached_property
    def revision(self) -> str:
        return self._revision or self._fingerprint()

    @property
    def has_tokenizer(self) -> bool:
        files = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
        return any((self.path / file).exists() for file in files)

    def load_weights(
        self, device: torch.device, dtype: torch.dtype, shard: Shard = WHOLE, stage: Stage = ALL_LAYERS
    ) -> Weights:
        spec = self.config.spec.stage(stage)
        return require_format(self.path).load(self.path, spec, device, dtype, shard)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        if not self.has_tokenizer:
            return super().tokenizer()
        _ = self.config  # transformers reads it as well, and would name its faults as the tokenizer's
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.path, local_files_only=True)
        except Exception as error:  # the tokenizers library raises bare Exceptions
            raise EngineError(f"The tokenizer in {self.path} cannot be read: {first_line(error)}") from error

    def _fingerprint(self) -> str:
        """SHA-256 over each weight file's name, size and both ends: quick, and any retraining changes it."""
        digest = hashlib.sha256()
        for file in sorted(self.path.glob("*.safetensors")):
            size = file.stat().st_size
            digest.update(f"{file.name} {size} ".encode())
            with file.open("rb") as stream:
                digest.update(stream.read(EDGE_BYTES))
                stream.seek(max(0, size - EDGE_BYTES))
                digest.update(stream.read(EDGE_BYTES))
        return digest.hexdigest()[:16]


def model_names() -> list[str]:
    """Every name that needs no download: the bundled models, then the shapes."""
    bundled = sorted(path.parent.name for path in BUNDLED.glob("*/config.json"))
    return bundled + [SHAPE_PREFIX + shape for shape in SHAPES]


def find_model(name: str) -> ModelSource:
    """The model called `name`: bundled, `shape:NAME`, a local directory, or a hub id `owner/model@revision`.

    A hub model is downloaded here (safetensors, json and tokenizer) unless it is in the local hub cache.

    Raises:
        EngineError: nothing of that name; the nearest names are given.
    """
    if name.startswith(SHAPE_PREFIX):
        return ShapeSource(name.removeprefix(SHAPE_PREFIX))
    if name in model_names():
        return DirectorySource(name, BUNDLED / name)
    try:
        path = Path(name).expanduser()
    except RuntimeError:
        raise EngineError(f"{name!r} names a home directory that is not there; give a full path.") from None
    if path.is_dir():
        return DirectorySource(name, path)
    if HUB_ID.fullmatch(name) and not name.startswith("."):
        return _from_hub(name)
    raise EngineError(
        f"Unknown model {name!r}; {_nearest(name, model_names())}, or give a directory or a hub id."
    )


def _from_hub(name: str) -> DirectorySource:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    repository, _, revision = name.partition("@")
    try:
        folder = snapshot_download(
            repository, revision=revision or None, allow_patterns=HUB_FILES, ignore_patterns=HUB_FOLDERS
        )
        # A repository may keep its weights twice, as consolidated.safetensors or in folders; take them once.
        weights = [glob.escape(file) for file in weight_files(Path(folder))]
        snapshot_download(repository, revision=Path(folder).name, allow_patterns=weights)
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise EngineError(
            f"Model {name!r} is neither a local directory nor to be had from the hub: {first_line(error)}"
        ) from error
    return DirectorySource(name, Path(folder), revision=Path(folder).name)


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, cutoff=0.4)
    return f"did you mean {' or '.join(close)}" if close else f"known are {', '.join(known)}"
