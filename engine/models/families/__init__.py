"""Model families: each is one file of this folder, which declares how it differs from a plain Llama.

A file exports `FAMILY = Family(...)`; nothing lists the files but the folder itself.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from backbench.engine.models.fields import FIELDS, Field, Fields, shown, whole
from backbench.errors import EngineError

Windows = tuple[int | None, ...]
"""Per layer: a query sees this many latest keys, itself included; None = all."""


@dataclass(frozen=True)
class Family:
    """Models of one architecture: what their config may say, and what they add to a plain Llama."""

    name: str
    """`model_type` in a config.json."""
    architecture: str
    """The class in `architectures`."""
    windows: Callable[[Fields, int], Windows]
    """Each layer's sliding window, of the config's fields and the number of layers."""
    qkv_bias: bool = False
    qk_norm: bool = False
    own_fields: Mapping[str, Field] = field(default_factory=dict)
    """Fields that this family's config class has beside `FIELDS`, or means differently."""

    @property
    def fields(self) -> dict[str, Field]:
        """Every field a config of this family may have."""
        return {**FIELDS, **self.own_fields}


def families() -> dict[str, Family]:
    """Every family by its name, from the files of this folder."""
    modules = sorted(module.name for module in pkgutil.iter_modules(__path__))
    found = [importlib.import_module(f"{__name__}.{module}").FAMILY for module in modules]
    return {family.name: family for family in found}


def one_window(fields: Fields, num_layers: int) -> Windows:
    """All layers share `sliding_window`, or have none; `layer_types` may only repeat that."""
    window = fields.optional_size("sliding_window")
    expected = "full_attention" if window is None else "sliding_attention"
    if other := set(_layer_types(fields, num_layers, expected)) - {expected}:
        raise EngineError(
            f"The config's layer_types names {', '.join(sorted(other))}, but with a sliding_window of "
            f"{window} this architecture computes {expected} in all layers."
        )
    return (window,) * num_layers


def window_by_layer(fields: Fields, num_layers: int) -> Windows:
    """`layer_types` says which layers have the window; without it, those from `max_window_layers` on."""
    window = fields.optional_size("sliding_window") if fields.flag("use_sliding_window") else None
    if fields["layer_types"] is None:
        first = whole(fields["max_window_layers"], "max_window_layers", 0)
        return tuple(window if layer >= first else None for layer in range(num_layers))
    kinds = _layer_types(fields, num_layers, "full_attention")
    if window is None and "sliding_attention" in kinds:
        raise EngineError(
            "The config's layer_types names sliding_attention, but use_sliding_window is false "
            "or sliding_window null."
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _layer_types(fields: Fields, num_layers: int, absent: str) -> list[str]:
    """Each layer's kind of attention; all `absent` where the config does not say."""
    kinds = fields["layer_types"]
    if kinds is None:
        return [absent] * num_layers
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise EngineError(f"The config's layer_types must name {num_layers} layers; it is {shown(kinds)}.")
    if odd := [kind for kind in kinds if kind not in ("full_attention", "sliding_attention")]:
        raise EngineError(
            f"Layers of type {shown(odd[0])} are not served; only full_attention and sliding_attention are."
        )
    return kinds
