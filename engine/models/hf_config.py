"""Reading a config.json in Hugging Face layout, as transformers means it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from backbench.engine.models.config import DTYPES, ModelConfig
from backbench.engine.models.families import Family, families
from backbench.engine.models.fields import LARGEST, Fields, number, shown, whole
from backbench.engine.models.formats import schemes_of
from backbench.engine.models.rope import ROPE_KINDS, RopeConfig
from backbench.errors import EngineError

MOST_LAYERS = 10_000
ROPE_FIELDS = frozenset(
    (
        *("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "finetuned"),
        *("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
        *("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
    )
)
"""What the rotary settings may say; anything else belongs to a kind that is not served."""


def from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json, in transformers 5's layout or an older one.

    Raises:
        EngineError: an unknown architecture (what is known is listed), a missing, malformed or unknown
            field, or a variant of the family that this engine does not compute.
    """
    schemes = schemes_of(config)
    family = _family(config)
    fields = Fields(config, family.fields)
    hidden_size = fields.size("hidden_size")
    q_heads = fields.size("num_attention_heads")
    kv_heads = fields.optional_size("num_key_value_heads") or q_heads
    if q_heads % kv_heads:
        raise EngineError(
            f"The config's {q_heads} attention heads do not divide among {kv_heads} key-value heads."
        )
    num_layers = fields.size("num_hidden_layers", MOST_LAYERS)
    rope = _rope(fields)
    return ModelConfig(
        architecture=family.name,
        vocab_size=fields.size("vocab_size"),
        hidden_size=hidden_size,
        num_layers=num_layers,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=_head_dim(fields, hidden_size, q_heads),
        ffn_size=fields.size("intermediate_size"),
        rms_norm_eps=fields.number("rms_norm_eps"),
        rope=rope,
        tied_embeddings=fields.flag("tie_word_embeddings"),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        windows=family.windows(fields, num_layers),
        max_len=_max_len(fields, rope),
        eos_token_ids=eos_token_ids(fields["eos_token_id"]),
        dtype=_dtype(fields),
        schemes=schemes,
    )


def eos_token_ids(value: Any) -> tuple[int, ...]:
    """The ids that end a sequence: `eos_token_id` of a config.json or generation_config.json."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(whole(each, "eos_token_id", 0) for each in values)


def read_json(path: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of model `name`; raises EngineError in one line."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EngineError(
            f"Model {name} has no {path.name}; {path.parent} is no checkpoint directory."
        ) from None
    except RecursionError:
        raise EngineError(f"{path} cannot be read: it is nested too deeply.") from None
    except (OSError, ValueError) as error:
        raise EngineError(f"{path} cannot be read: {first_line(error)}") from error
    if not isinstance(value, dict):
        raise EngineError(f"{path} must hold a JSON object.")
    return value


def first_line(error: Exception) -> str:
    """What an error says, on one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _family(config: Mapping[str, Any]) -> Family:
    """The family that `architectures` names, or `model_type` where that says nothing."""
    known = families()
    named, model_type = config.get("architectures") or [], config.get("model_type")
    if not isinstance(named, list) or not isinstance(model_type, str | None):
        raise EngineError("The config's architectures must be a list of names, and its model_type a name.")
    by_architecture = {family.architecture: family for family in known.values()}
    found = [by_architecture[name] for name in named if isinstance(name, str) and name in by_architecture]
    if not named and model_type in known:
        return known[str(model_type)]
    if not found:
        raise EngineError(
            f"Unknown architecture {shown(named[0] if named else model_type)}; "
            f"known are {', '.join(by_architecture)}."
        )
    if model_type not in (None, found[0].name):
        raise EngineError(
            f"The config's model_type {shown(model_type)} contradicts its architecture "
            f"{found[0].architecture}; transformers would go by the first."
        )
    return found[0]


def _head_dim(fields: Fields, hidden_size: int, q_heads: int) -> int:
    """As given, or as the class has it, or what the heads' share of the hidden size is."""
    head_dim = fields.optional_size("head_dim") or hidden_size // q_heads
    if head_dim < 1 or head_dim % 2:
        raise EngineError(f"Heads of {head_dim} features cannot be rotated; head_dim must be even.")
    return head_dim


def _rope_settings(fields: Fields) -> Mapping[str, Any]:
    """What `rope_parameters` (transformers 5) or `rope_scaling` (older) says beside `rope_theta`."""
    new, old = fields["rope_parameters"], fields["rope_scaling"]
    for name, value in (("rope_parameters", new), ("rope_scaling", old)):
        if value is not None and not isinstance(value, Mapping):
            raise EngineError(f"The config's {name} must be an object; it is {shown(value)}.")
    if new and old and new != old:
        raise EngineError("The config has rope_parameters and a different rope_scaling; remove one.")
    values = new or old or {}
    if any(isinstance(value, Mapping) for value in values.values()):
        raise EngineError("rope_parameters that differ by layer type are not served.")
    if unknown := sorted(set(values) - ROPE_FIELDS):
        raise EngineError(f"The config's rotary settings have {shown(unknown[0])}, which is not served.")
    if not (values.get("rope_type") or values.get("type")) and set(values) - {"rope_theta"}:
        raise EngineError(
            "The config's rotary settings name no rope_type, so the rest of them would be ignored; "
            f"it is one of {', '.join(ROPE_KINDS)}."
        )
    return values


def _rope(fields: Fields) -> RopeConfig:
    values = _rope_settings(fields)
    kind = values.get("rope_type") or values.get("type") or "default"
    if kind not in ROPE_KINDS:
        raise EngineError(f"Unknown rope type {shown(kind)}; known are {', '.join(ROPE_KINDS)}.")
    if values.get("partial_rotary_factor") not in (None, 1.0):
        raise EngineError(
            f"A partial_rotary_factor of {shown(values['partial_rotary_factor'])} is not served; only 1 is."
        )

    def given(name: str, default: float | None) -> float:
        """A positive number; default: None = the kind cannot do without it."""
        value = values.get(name)
        if value is None and default is None:
            raise EngineError(f"Rope type {kind!r} needs a {name!r} in the config's rope_parameters.")
        return number(default if value is None else value, name)

    def optional(name: str) -> float | None:
        return None if values.get(name) is None else number(values[name], name)

    max_len = fields.size("max_position_embeddings")
    # transformers lets the config's own field overrule that of the rotary settings.
    original = fields.optional_size("original_max_position_embeddings")
    if original is None:
        inner = values.get("original_max_position_embeddings")
        original = max_len if inner is None else whole(inner, "original_max_position_embeddings", 1)
    by_kind: dict[str, float | None] = {"linear": None, "llama3": None, "yarn": max_len / original}
    truncate = values.get("truncate", True)
    if not isinstance(truncate, bool):
        raise EngineError(f"The config's truncate must be true or false; it is {shown(truncate)}.")
    outer = fields["rope_theta"]
    theta = given("rope_theta", 10_000.0 if outer is None else number(outer, "rope_theta"))
    if theta <= 1:
        raise EngineError(f"The config's rope_theta must be above 1; it is {theta}.")
    return RopeConfig(
        theta=theta,
        kind=kind,
        factor=given("factor", by_kind[kind]) if kind in by_kind else 1.0,
        original_max_len=original,
        low_frequency_factor=given("low_freq_factor", None if kind == "llama3" else 1.0),
        high_frequency_factor=given("high_freq_factor", None if kind == "llama3" else 4.0),
        beta_fast=given("beta_fast", 32.0),
        beta_slow=given("beta_slow", 1.0),
        attention_factor=optional("attention_factor"),
        mscale=optional("mscale"),
        mscale_all_dim=optional("mscale_all_dim"),
        truncate=truncate,
    )


def _max_len(fields: Fields, rope: RopeConfig) -> int:
    """The context: what the config says, or what yarn stretches the original to where that is more."""
    max_len = fields.size("max_position_embeddings")
    if rope.kind != "yarn":
        return max_len
    stretched = min(rope.factor * rope.original_max_len, LARGEST + 1)
    return max(max_len, whole(round(stretched), "factor times original_max_position_embeddings", 0))


def _dtype(fields: Fields) -> torch.dtype:
    named = fields["dtype"] or fields["torch_dtype"] or "float32"
    name = named.removeprefix("torch.") if isinstance(named, str) else shown(named)
    if name not in DTYPES:
        raise EngineError(f"A checkpoint in {shown(name)} is not served; use one in {', '.join(DTYPES)}.")
    return DTYPES[name]
