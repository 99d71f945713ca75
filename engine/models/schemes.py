"""Which scheme each linear of a checkpoint is kept in, as its config says, before any weight is read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from backbench.backends.interface import Scheme
from backbench.engine.models.fields import shown
from backbench.engine.models.layers import DENSE
from backbench.errors import EngineError

_BOUNDARY = r"(?:(?<=\.)|(?=\.|$))"


@dataclass(frozen=True)
class Schemes:
    """Rules in order; the first whose pattern matches a linear's name from its start says its scheme."""

    rules: tuple[tuple[str, Scheme], ...]
    """(regular expression, scheme); what none matches is dense."""

    def __post_init__(self) -> None:
        for pattern, _ in self.rules:
            try:
                re.compile(pattern)
            except re.error as error:
                raise EngineError(
                    f"The quantization_config has {shown(pattern)}, which is no regular expression: {error}."
                ) from None

    def of(self, linear: str) -> Scheme:
        """The scheme of one linear, as "model.layers.0.mlp.down_proj"."""
        return next((scheme for pattern, scheme in self.rules if re.match(pattern, linear)), DENSE)

    def of_product(self, rows_of: Mapping[str, int]) -> Scheme:
        """The scheme of these linears' rows (name -> rows, in order) as one product.

        A block of scales that would span two linears is spread over its rows, which changes no number.

        Raises:
            EngineError: the linears are kept in different ways; they are named.
        """
        found = {name: self.of(name) for name in rows_of}
        scheme, *others = dict.fromkeys(found.values())
        if others:
            kept = ", ".join(f"{name.rpartition('.')[2]} as {each}" for name, each in found.items())
            parent = next(iter(found)).rpartition(".")[0]
            raise EngineError(f"{parent} keeps {kept}, which are multiplied at once and must be alike.")
        if any(rows % scheme.group_n for rows in list(rows_of.values())[:-1]):
            return replace(scheme, group_n=1)
        return scheme


def exactly(names: Iterable[str]) -> tuple[tuple[str, Scheme], ...]:
    """Rules that keep the linears of these very names dense."""
    return tuple((f"{re.escape(name)}$", DENSE) for name in names)


def unconverted(keys: Iterable[str]) -> tuple[tuple[str, Scheme], ...]:
    """Rules that keep dense what `modules_to_not_convert` means: a start up to a dot, as text or regular
    expression, or an end. Source: `should_convert_module` of transformers."""
    return tuple(rule for key in keys for rule in _unconverted(key))


def _unconverted(key: str) -> tuple[tuple[str, Scheme], ...]:
    return (f"(?:{key}){_BOUNDARY}", DENSE), (f".*{re.escape(key)}$", DENSE)
