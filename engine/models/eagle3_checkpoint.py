"""Reading an EAGLE-3 head: the layout of its authors (github.com/SafeAILab/EAGLE) and that of speculators.

The first has one flat config.json and calls its layer `midlayer`; the second (`speculators_model_type`) keeps
the layer's settings in `transformer_layer_config` and calls it `layers.0`. Both have `fc`, `norm`, `lm_head`
and `d2t` (the target's id of a drafted one, less its own), and `embed_tokens`, unless it is the target's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbench.backends.interface import Weight
from backbench.engine.models.config import ModelConfig
from backbench.engine.models.eagle3 import Eagle3Config, Eagle3Weights
from backbench.engine.models.fields import (
    OFF,
    REQUIRED,
    Field,
    Fields,
    Honoured,
    Refused,
    WithoutEffect,
    shown,
    whole,
)
from backbench.engine.models.formats import require_format
from backbench.engine.models.formats.dense import SafetensorsFiles
from backbench.engine.models.hf_config import from_hf
from backbench.engine.models.layers import DENSE, Product, TensorSpec
from backbench.engine.models.weights import LayerWeights, Weights, filled
from backbench.errors import EngineError

LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
HEAD_FIELDS: dict[str, Field] = {
    "draft_vocab_size": Honoured(),
    "target_hidden_size": Honoured(),
    "norm_before_residual": Honoured(False),
    LAYER_IDS: Honoured(),
    "eagle_config": Honoured(),
    "norm_before_fc": OFF,
    "fc_norm": OFF,
    "norm_output": OFF,
}
"""What a config says of the head beside its layer. Source: `llama_eagle3.py` of vLLM."""
BESIDE = (
    *("architectures", "auto_map", "base_model_ep_plan", "dtype", "embed_requires_grad"),
    *("enable_sp_ulysses", "has_no_defaults_at_init", "model_type", "speculators_config"),
    *("speculators_version", "tie_word_embeddings", "torch_dtype", "transformers_version"),
)
"""Fields of the second layout that change nothing which is computed."""
SPECULATORS_FIELDS: dict[str, Field] = {
    **HEAD_FIELDS,
    # Libraries disagree on what its absence means: speculators says false, vLLM true.
    "norm_before_residual": Honoured(REQUIRED),
    "speculators_model_type": Refused(("eagle3",)),
    "transformer_layer_config": Honoured(REQUIRED),
    **dict.fromkeys(BESIDE, WithoutEffect()),
}
UNUSED_TENSORS = frozenset({"t2d", "verifier_norm.weight", "verifier_lm_head.weight"})
"""What a checkpoint may hold that is not read: `t2d` says what `d2t` does, the target has the others."""


def head_config(name: str, folder: Path, config: Mapping[str, Any], target: ModelConfig) -> Eagle3Config:
    """The shape of the head in `folder`, called `name`, whose config.json says `config`.

    Raises EngineError, which names the field or tensor, where it is no EAGLE-3 head or not one of `target`.
    """
    stored = require_format(folder).names(folder)
    if "fc.weight" not in stored:
        raise EngineError(f"{name} is no EAGLE-3 head: it has no tensor fc.weight.")
    try:
        layer, said = _speculators(config) if "speculators_model_type" in config else _flat(config)
        head = _head_config(from_hf(layer), said, stored, target)
    except EngineError as error:
        raise EngineError(f"The EAGLE-3 head {name}: {error}") from None
    known = {source for tensor in _tensors(head) for source, _ in tensor.sources} | UNUSED_TENSORS | {"d2t"}
    if unknown := sorted(each for each in stored - known if "rotary_emb" not in each):
        raise EngineError(
            f"The EAGLE-3 head {name} has tensor {shown(unknown[0])}, which may change what it computes and "
            "is unknown here."
        )
    return head


def load_head(folder: Path, config: Eagle3Config, device: torch.device, dtype: torch.dtype) -> Eagle3Weights:
    """The head's weights; raises EngineError naming a tensor that is missing, malformed or not finite."""
    with SafetensorsFiles(folder) as files:
        has_embedding = "embed_tokens.weight" in files.file_of
        for wanted in _tensors(config):
            if wanted.role != "embedding" or has_embedding:
                files.require_all(wanted)

        def tensor(wanted: TensorSpec) -> Tensor:
            return filled(wanted, device, dtype, files.fill)

        def held(wanted: TensorSpec) -> Any:
            return Weight(DENSE, tensor(wanted)) if isinstance(wanted, Product) else tensor(wanted)

        spec = config.spec
        none = torch.empty(0, config.hidden_size, device=device, dtype=dtype)
        decoder = Weights(
            embedding=tensor(spec.embedding) if has_embedding else none,
            layers=[LayerWeights(**{each.role: held(each) for each in spec.layers[0].tensors})],
            final_norm=tensor(spec.final_norm),
            lm_head=held(spec.head),
        )
        return Eagle3Weights(
            decoder, held(config.fusion), tensor(config.hidden_norm), _target_ids(files, config, device)
        )


def _flat(config: Mapping[str, Any]) -> tuple[dict[str, Any], Fields]:
    """The layer's settings, and the head's, of one object with both."""
    layer = {name: value for name, value in config.items() if name not in HEAD_FIELDS}
    # The class named there is the head's (or, in the authors' own checkpoints, plainly Llama's).
    layer.pop("architectures", None)
    said = {name: config[name] for name in HEAD_FIELDS if name in config}
    return {"model_type": "llama"} | layer, Fields(said, HEAD_FIELDS)


def _speculators(config: Mapping[str, Any]) -> tuple[dict[str, Any], Fields]:
    said = Fields(config, SPECULATORS_FIELDS)
    layer = said["transformer_layer_config"]
    if not isinstance(layer, Mapping):
        raise EngineError(f"transformer_layer_config must be an object; it is {shown(layer)}.")
    return {"model_type": "llama"} | {**layer}, said


def _head_config(
    layer: ModelConfig, said: Fields, stored: frozenset[str], target: ModelConfig
) -> Eagle3Config:
    target_hidden_size = said.optional_size("target_hidden_size") or layer.hidden_size
    draft_vocab_size = said.optional_size("draft_vocab_size") or layer.vocab_size
    if layer.num_layers != 1:
        raise EngineError(f"num_hidden_layers is {layer.num_layers}; heads of one layer are served.")
    if layer.schemes is not None:
        raise EngineError("it is quantized (quantization_config); dense heads are served.")
    if target_hidden_size != target.hidden_size:
        field = "hidden_size" if said["target_hidden_size"] is None else "target_hidden_size"
        raise EngineError(f"{field} is {target_hidden_size}, and the model has {target.hidden_size}.")
    if layer.vocab_size != target.vocab_size:
        raise EngineError(f"vocab_size is {layer.vocab_size}, and the model has {target.vocab_size}.")
    if draft_vocab_size > target.vocab_size:
        raise EngineError(f"draft_vocab_size is {draft_vocab_size}, above the model's {target.vocab_size}.")
    if draft_vocab_size < target.vocab_size and "d2t" not in stored:
        raise EngineError(f"draft_vocab_size is {draft_vocab_size}, and no tensor d2t says of which tokens.")
    if layer.hidden_size != target.hidden_size and "embed_tokens.weight" not in stored:
        raise EngineError(
            f"hidden_size is {layer.hidden_size}, not the model's, so it needs a tensor embed_tokens.weight."
        )
    midlayer = any(name.startswith("midlayer.") for name in stored)
    return Eagle3Config(
        **{each.name: getattr(layer, each.name) for each in fields_of(ModelConfig)},
        target_hidden_size=target_hidden_size,
        target_layers=_target_layers(said, target.num_layers),
        draft_vocab_size=draft_vocab_size,
        norm_before_residual=said.flag("norm_before_residual"),
        prefix="midlayer" if midlayer else "layers.0",
    )


def _target_layers(said: Fields, num_layers: int) -> tuple[int, ...]:
    """The layers of the target of which the head is given what enters them.

    `eagle_aux_hidden_state_layer_ids` counts so at the top (vLLM, speculators); inside of `eagle_config` it
    names layers by what leaves them (SGLang's `set_eagle3_layers_to_capture`). Neither: the authors' choice,
    2, the middle, and the third from the last.
    """
    nested = said["eagle_config"]
    if not isinstance(nested, Mapping | None):
        raise EngineError(f"eagle_config must be an object; it is {shown(nested)}.")
    if nested is not None and (odd := sorted(set(nested) - {LAYER_IDS, "use_aux_hidden_state"})):
        raise EngineError(f"eagle_config has {shown(odd[0])}, which is unknown here.")
    if nested is not None and nested.get("use_aux_hidden_state", True) is not True:
        raise EngineError("eagle_config has use_aux_hidden_state off; heads over several layers are served.")
    given, leaving = said[LAYER_IDS], (nested or {}).get(LAYER_IDS)
    if given is None and leaving is None:
        default = 2, num_layers // 2, num_layers - 3
        if not all(0 <= layer < num_layers for layer in default):
            raise EngineError(f"it needs {LAYER_IDS}: the usual layers are {default} of {num_layers}.")
        return default
    ids = leaving if given is None else given
    if not isinstance(ids, list) or not ids:
        raise EngineError(f"{LAYER_IDS} must be a list of layers; it is {shown(ids)}.")
    after = 1 if given is None else 0
    return tuple(whole(each, LAYER_IDS, 0, num_layers - 1 - after) + after for each in ids)


def _tensors(config: Eagle3Config) -> list[TensorSpec]:
    """All that a checkpoint holds but `d2t`; the embedding may be missing."""
    return [*config.spec.tensors(), config.fusion, config.hidden_norm]


def _target_ids(files: SafetensorsFiles, config: Eagle3Config, device: torch.device) -> Tensor | None:
    """The target's id of each drafted token; None where they are the same."""
    if "d2t" not in files.file_of:
        return None
    files.require("d2t", (config.draft_vocab_size,))
    offsets = files.read("d2t", dtypes=(torch.int64, torch.int32)).long()
    ids = torch.arange(config.draft_vocab_size) + offsets
    if ids.min() < 0 or ids.max() >= config.vocab_size or len(ids.unique()) < len(ids):
        raise EngineError(
            f"Tensor d2t in {files.folder} does not lead to different tokens of the {config.vocab_size} that "
            "the model has."
        )
    return ids.to(device)
