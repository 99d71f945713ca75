"""Checkpoint formats: each is one file of this folder, which loads weights into the canonical layout.

A file exports `FORMAT = SomeFormat()`. What comes of it is the same whatever the file held: `Weight`s, of
of which `TensorSpec.shard` gives a device's part, and which backends pack.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from backbench.engine.models.fields import shown
from backbench.engine.models.layers import WHOLE, ModelSpec, Shard
from backbench.engine.models.schemes import Schemes
from backbench.engine.models.weights import Weights
from backbench.errors import EngineError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
UNREAD = {
    "modelopt": "NVIDIA's Model Optimizer",
    "quark": "AMD's Quark",
    "gguf": "llama.cpp",
    "bitsandbytes": "bitsandbytes",
    "torchao": "torchao",
    "exl3": "ExLlamaV3",
    "exl2": "ExLlamaV2",
    "auto-round": "AutoRound in its own layout",
    "mxfp4": "transformers, as gpt-oss is",
    "fbgemm_fp8": "FBGEMM",
    "hqq": "HQQ",
    "aqlm": "AQLM",
    "quanto": "Quanto",
    "fp_quant": "FP-Quant",
    "eetq": "EETQ",
    "higgs": "HIGGS",
    "vptq": "VPTQ",
    "spqr": "SpQR",
    "bitnet": "BitNet",
}
"""`quant_method` -> who writes it: known, and not read."""


class WeightFormat(ABC):
    """One way to keep weights in a directory."""

    method: str | None = None
    """`quant_method` in the `quantization_config` of config.json; None = not quantized."""

    @abstractmethod
    def recognises(self, folder: Path) -> bool:
        """True where `folder` holds weights of this format; nothing of them is read."""

    def schemes(self, settings: Mapping[str, Any]) -> Schemes:
        """Each linear's scheme, of a `quantization_config` of this method; raises EngineError naming the
        setting that is not served."""
        raise NotImplementedError(f"{type(self).__name__} is not quantized.")

    @abstractmethod
    def names(self, folder: Path) -> frozenset[str]:
        """The tensors that are stored. Raises EngineError where the directory contradicts itself."""

    @abstractmethod
    def differ(self, folder: Path, one: str, other: str) -> bool:
        """True where the two stored tensors are not the same numbers."""

    @abstractmethod
    def load(
        self,
        folder: Path,
        spec: ModelSpec,
        device: torch.device,
        dtype: torch.dtype,
        shard: Shard = WHOLE,
    ) -> Weights:
        """The weights, or a device's part, on `device` in the canonical layout, dense ones in `dtype`.

        Raises:
            EngineError: a tensor is missing, malformed, or not finite; it is named.
        """


def schemes_of(config: Mapping[str, Any]) -> Schemes | None:
    """What a config.json says of how its linears are kept; None = all dense.

    Raises:
        EngineError: a method or a setting that is not read; it is named.
    """
    settings = config.get("quantization_config")
    if not settings:
        return None
    if not isinstance(settings, Mapping):
        raise EngineError(f"The config's quantization_config must be an object; it is {shown(settings)}.")
    method = settings.get("quant_method")
    for each in formats():
        if each.method is not None and each.method == method:
            return each.schemes(settings)
    if method is None and any(str(name).startswith("load_in_") for name in settings):
        method = "bitsandbytes"
    raise _unread(method)


def settings_of(folder: Path) -> Mapping[str, Any]:
    """The `quantization_config` in a directory's config.json; empty where there is none."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    settings = config.get("quantization_config") if isinstance(config, dict) else None
    return settings if isinstance(settings, dict) else {}


def method_of(folder: Path) -> str | None:
    """How the weights in a directory are quantized; None = not at all."""
    settings = settings_of(folder)
    if not settings and (folder / "hf_quant_config.json").exists():
        return "modelopt"  # its exports before 2026 say nothing in config.json
    method = settings.get("quant_method")
    return method if isinstance(method, str) else None


def has_weight_files(folder: Path) -> bool:
    """True where the directory holds safetensors under the names that transformers gives them."""
    return (folder / SINGLE).exists() or (folder / INDEX).exists()


def format_of(folder: Path) -> WeightFormat | None:
    """The format of the weights in `folder`; None = it holds none."""
    return next((each for each in formats() if each.recognises(folder)), None)


def require_format(folder: Path) -> WeightFormat:
    """As `format_of`; raises EngineError where it holds none."""
    found = format_of(folder)
    if found is None:
        if has_weight_files(folder):
            raise _unread(method_of(folder))
        if found_gguf := next(iter(sorted(folder.glob("*.gguf"))), None):
            raise EngineError(f"{found_gguf} is a GGUF file, which is not read; convert it to safetensors.")
        raise EngineError(f"{folder} holds no weights that are served: {SINGLE}, or shards with {INDEX}.")
    return found


def _unread(method: object) -> EngineError:
    """Why weights quantized by this method are not loaded."""
    by = UNREAD.get(method) if isinstance(method, str) else None
    said = f"in {shown(method)}, the format of {by}," if by else f"by the unknown method {shown(method)},"
    read = ", ".join(each.method for each in formats() if each.method is not None)
    return EngineError(f"The checkpoint is quantized {said} which is not read; {read} are.")


def formats() -> list[WeightFormat]:
    """Every format, from the files of this folder."""
    modules = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return [importlib.import_module(f"{__name__}.{module}").FORMAT for module in modules]
