"""An option, declared once: a dataclass field that says what it is for and what it accepts.

    rate: float | None = option(None, "Open loop at R requests a second.", group="load", above=0, maximum=1e6)

The command line, the configuration file and Python's keywords derive from these fields (harness/options.py,
harness/flags.py), and `settle` checks a value whichever way it came.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from backbench.errors import BackbenchError

DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"} | {
    "fp32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
}
"""Name of a data type as it may be typed -> its name in torch and in the record."""
LONGEST_TEXT = 4096
"""Characters of a name, path or specification: the longest path a system takes."""
_METADATA = "backbench.option"


@dataclass(frozen=True)
class Option:
    """One option. Bounds hold for every number in its value."""

    field: str
    """The dataclass field that holds it."""
    name: str
    """As it is typed, with underscores: `max_step_tokens` is --max-step-tokens, and in a file that key."""
    kind: Any
    """bool, int, float, str, Path, (float, float), or dict, which only `read` understands."""
    default: Any
    """MISSING where a value has to be given."""
    help: str
    group: str = ""
    """The heading it stands under; "" = it follows from others and is nowhere typed."""
    unset: str = ""
    """What is done where nothing is given, for help."""
    metavar: str = ""
    short: str = ""
    also: tuple[str, ...] = ()
    """Other names it is known by."""
    minimum: float | None = None
    above: float | None = None
    """A minimum that is not itself allowed."""
    maximum: float | None = None
    choices: Mapping[str, str] | None = None
    """What may be typed -> what it means."""
    read: Callable[[Any], Any] | None = None
    """Turns what was given into the value; raises BackbenchError."""

    @property
    def flag(self) -> str:
        """As typed on the command line."""
        return flag(self.name)

    def accept(self, value: Any, error: type[BackbenchError] = BackbenchError) -> Any:
        """The value in its own type; raises `error`, one line, where it is not one or out of bounds."""
        if value is None and self.default is None:
            return None
        if self.read is not None:
            return value if value == self.default else self.read(value)
        try:
            found = _in_kind(self.kind, value)
        except TypeError:
            raise error(f"{self.flag} must be {_KINDS[self.kind]}, not {value!r}.") from None
        if isinstance(found, str | Path) and (len(str(found)) > LONGEST_TEXT or "\0" in str(found)):
            raise error(f"{self.flag} must be at most {LONGEST_TEXT} characters without a NUL.")
        if self.choices is not None and found not in self.choices:
            raise error(f"{self.flag} must be one of {', '.join(self.choices)}; not {found!r}.")
        for number in found if isinstance(found, tuple) else (found,):
            if isinstance(number, int | float) and not self._within(number):
                raise error(f"{self.flag} must be {self._bounds()}, not {_text(number)}.")
        return found if self.choices is None else self.choices[found]

    def _within(self, number: float) -> bool:
        return (
            math.isfinite(number)
            and (self.minimum is None or number >= self.minimum)
            and (self.above is None or number > self.above)
            and (self.maximum is None or number <= self.maximum)
        )

    def _bounds(self) -> str:
        bounds = (("at least", self.minimum), ("above", self.above), ("at most", self.maximum))
        parts = [f"{word} {_text(bound)}" for word, bound in bounds if bound is not None]
        return " and ".join(parts) or "finite"


def option(default: Any, help: str, *, group: str = "", **facts: Any) -> Any:
    """A dataclass field that is an option; `facts` are fields of Option. MISSING = no default."""
    metadata = {_METADATA: {"help": help, "group": group} | facts}
    if default is MISSING:
        return field(metadata=metadata)
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


def options_of(declared: Any) -> tuple[Option, ...]:
    """The options among a dataclass's fields, in order."""
    hints = get_type_hints(declared)
    return tuple(_option(each, hints[each.name]) for each in fields(declared) if _METADATA in each.metadata)


def settle(instance: Any, error: type[BackbenchError]) -> None:
    """Check every option of a dataclass and store it in its own type; raises `error`, one line."""
    for each in options_of(type(instance)):
        object.__setattr__(instance, each.field, each.accept(getattr(instance, each.field), error))


def flag(name: str) -> str:
    """An option's name as it is typed: `max_seqs` is --max-seqs."""
    return "--" + name.replace("_", "-")


def _option(declared: Field[Any], hint: Any) -> Option:
    facts = {"name": declared.name} | declared.metadata[_METADATA]
    default = declared.default if declared.default_factory is MISSING else declared.default_factory()
    return Option(field=declared.name, kind=_kind(hint), default=default, **facts)


def _kind(hint: Any) -> Any:
    """`int | None` is int, a path among others is Path, and a pair of numbers (float, float)."""
    kinds = [each for each in get_args(hint) if each is not NoneType] or [hint]
    if get_origin(hint) is dict or hint is dict:
        return dict
    if Path in kinds:
        return Path
    (kind,) = kinds
    return (float, float) if get_origin(kind) is tuple else kind


def _text(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"


_KINDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    (float, float): "two numbers",
}


def _in_kind(kind: Any, value: Any) -> Any:
    """The value as `kind`; TypeError where it is something else. Nothing is rounded or parsed."""
    if kind in (str, Path) and isinstance(value, str | os.PathLike):
        return kind(os.fspath(value))
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    if kind is float and isinstance(value, Real) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return math.inf
    if kind == (float, float) and isinstance(value, tuple | list) and len(value) == 2:
        return tuple(_in_kind(float, each) for each in value)
    raise TypeError
