"""Every field a config.json may have: which are honoured, which are refused, which have no effect.

A field that changes the function and is ignored would be another model, silently. So what this table does
not name is refused by name, and `tests/engine/models/test_fields.py` compares it with the config classes of
transformers.
"""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from backbench.errors import EngineError

REQUIRED = object()
"""Instead of a class default: a config without the field is refused."""
MAX_FLOAT = sys.float_info.max
MOST_SHOWN = 80
"""Characters of a value in a message."""
LARGEST = 2**31 - 1
"""Of any size: what fits the 32-bit integers of kernels and libraries."""


@dataclass(frozen=True)
class Honoured:
    """The function is computed as the field says."""

    default: Any = None
    """The class default in transformers: what an absent field means."""


@dataclass(frozen=True)
class Refused:
    """The function would change; only the harmless values are served."""

    harmless: tuple[Any, ...]


@dataclass(frozen=True)
class WithoutEffect:
    """Training, bookkeeping or sampling defaults, which a request states itself."""


Field = Honoured | Refused | WithoutEffect
OFF = Refused((False, None))
ABSENT = Refused((None,))

HONOURED: dict[str, Field] = {
    "architectures": Honoured(),
    "model_type": Honoured(),
    "dtype": Honoured(),
    "torch_dtype": Honoured(),
    "vocab_size": Honoured(REQUIRED),
    "hidden_size": Honoured(REQUIRED),
    "intermediate_size": Honoured(REQUIRED),
    "num_hidden_layers": Honoured(REQUIRED),
    "num_attention_heads": Honoured(REQUIRED),
    "num_key_value_heads": Honoured(),
    "head_dim": Honoured(),
    "max_position_embeddings": Honoured(REQUIRED),
    "rms_norm_eps": Honoured(1e-6),
    "rope_parameters": Honoured(),
    "rope_scaling": Honoured(),
    "rope_theta": Honoured(),
    "original_max_position_embeddings": Honoured(),
    "layer_types": Honoured(),
    "tie_word_embeddings": Honoured(False),
    "eos_token_id": Honoured(),
    "quantization_config": Honoured(),
}
REFUSED: dict[str, Field] = {
    "hidden_act": Refused(("silu", "swish")),
    "partial_rotary_factor": Refused((1.0, None)),
    "sliding_window": ABSENT,
    "attention_chunk_size": ABSENT,
    "per_layer_config": Refused((None, {})),
    "pruned_heads": Refused((None, {})),
    "is_causal": Refused((True,)),
    "is_encoder_decoder": OFF,
    "add_cross_attention": OFF,
    "use_bidirectional_attention": OFF,
    "use_sliding_window": OFF,
    "use_mrope": OFF,
    "rope_interleaved": OFF,
    "attention_bias": OFF,
    "mlp_bias": OFF,
}
WITHOUT_EFFECT = {
    "bookkeeping": "transformers_version name_or_path auto_map tokenizer_class prefix finetuning_task "
    "task_specific_params problem_type id2label label2id num_labels transformers.js_config unsloth_version "
    "unsloth_fixed is_llama_config is_decoder max_sequence_length",
    "running": "output_hidden_states output_attentions return_dict use_return_dict use_cache "
    "chunk_size_feed_forward torchscript use_bfloat16 tf_legacy_loss attn_implementation pretraining_tp",
    "training": "initializer_range attention_dropout",
    "other architectures": "tie_encoder_decoder cross_attention_hidden_size max_window_layers",
    "tokens": "bos_token_id pad_token_id sep_token_id cls_token_id mask_token_id unk_token_id "
    "decoder_start_token_id bos_token eos_token pad_token unk_token",
    "sampling": "max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty "
    "temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size "
    "encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores return_dict_in_generate "
    "forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty "
    "suppress_tokens begin_suppress_tokens epsilon_cutoff eta_cutoff encoder_repetition_penalty",
}
"""Why a field changes nothing that is computed here -> the fields."""
FIELDS: dict[str, Field] = {
    **HONOURED,
    **REFUSED,
    **{name: WithoutEffect() for names in WITHOUT_EFFECT.values() for name in names.split()},
}
"""What all families have in common; each adds what its class has or means differently."""


class Fields:
    """A config's fields, checked against a table and read by type; an absent one is its class default."""

    def __init__(self, config: Mapping[str, Any], table: Mapping[str, Field]) -> None:
        """Raises EngineError where a field is refused or unknown to the table."""
        self._config = config
        self._table = table
        # transformers takes what starts with an underscore for its own, never for the model.
        names = [name for name in config if not name.startswith("_")]
        for name in names:
            field = table.get(name)
            if isinstance(field, Refused) and config[name] not in field.harmless:
                allowed = " or ".join(map(repr, field.harmless))
                raise EngineError(
                    f"The config's {name} of {shown(config[name])} is not served; only {allowed} is."
                )
        if unknown := [shown(name) for name in names if name not in table]:
            raise EngineError(
                f"The config has {', '.join(unknown[:4])}, which may change what the model computes and is "
                "unknown here; remove it from config.json if it does not."
            )

    def __getitem__(self, name: str) -> Any:
        field = self._table[name]
        default = field.default if isinstance(field, Honoured) else None
        return self._config.get(name, None if default is REQUIRED else default)

    def size(self, name: str, largest: int = LARGEST) -> int:
        """A positive integer."""
        return whole(self[name], name, 1, largest)

    def optional_size(self, name: str) -> int | None:
        """A positive integer or None."""
        return None if self[name] is None else self.size(name)

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self[name]
        if not isinstance(value, bool):
            raise EngineError(f"The model's config needs true or false as {name!r}; it has {shown(value)}.")
        return value

    def number(self, name: str) -> float:
        """A positive, finite number."""
        return number(self[name], name)


def whole(value: Any, name: str, least: int, largest: int = LARGEST) -> int:
    """`value` as an integer from `least` to `largest`; raises EngineError naming the field."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        kind = "a positive integer" if least == 1 else f"an integer of at least {least} as"
        raise EngineError(f"The model's config needs {kind} {name!r}; it has {shown(value)}.")
    if value > largest:
        raise EngineError(f"The model's config has {name!r} of {shown(value)}; at most {largest} is served.")
    return value


def number(value: Any, name: str) -> float:
    """`value` as a positive, finite float; raises EngineError naming the field."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_FLOAT:
        raise EngineError(f"The model's config needs a positive number as {name!r}; it has {shown(value)}.")
    return float(value)


def shown(value: Any) -> str:
    """`value` as a message may show it: short, on one line, without control characters."""
    text = reprlib.repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."
