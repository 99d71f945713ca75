"""Length distributions, written as short specs such as `lognormal:512:0.6`.

    fixed:N                       always N
    uniform:LOW:HIGH              both ends included
    normal:MEAN:STD[:MAX]         rounded
    lognormal:MEDIAN:SIGMA[:MAX]  exp(N(ln MEDIAN, SIGMA)), rounded
    zipf:EXPONENT:MAX             P(k) ~ k^-EXPONENT over 1..MAX
    empirical:A,B,C | empirical:FILE   one of the values, each line of FILE one value

Lengths are at least 1 and, where MAX is given, at most MAX.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from backbench.errors import WorkloadError

Draw = Callable[[np.random.Generator, int], NDArray[np.float64]]


@dataclass(frozen=True)
class Lengths:
    """A parsed spec. `sample` is prefix-stable: more draws leave the first ones as they were."""

    spec: str
    draw: Draw
    maximum: int | None = None

    def sample(self, generator: np.random.Generator, count: int) -> list[int]:
        """`count` lengths in tokens, each >= 1."""
        values = np.clip(np.rint(self.draw(generator, count)), 1, self.maximum or 2**31)
        return [int(value) for value in values]


def parse_lengths(spec: str) -> Lengths:
    """Parse a spec; WorkloadError names the spec, what is wrong and the valid forms."""
    kind, _, rest = spec.partition(":")
    if kind == "empirical":
        return _empirical(spec, rest)
    if kind not in _FORMS:
        near = difflib.get_close_matches(kind, [*_FORMS, "empirical"], n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else f"use {', '.join(_FORMS)} or empirical."
        raise WorkloadError(f"unknown length distribution '{kind}' in '{spec}'; {hint}")
    form, required, build = _FORMS[kind]
    values = _numbers(spec, rest, form)
    optional = form.count("[")
    if not required <= len(values) <= required + optional:
        raise WorkloadError(f"length spec '{spec}' has {len(values)} numbers; write it as {form}.")
    if not _in_range(kind, values):
        raise WorkloadError(f"length spec '{spec}' is out of range; write it as {form}, lengths at least 1.")
    maximum = int(values[required]) if len(values) > required else None
    return Lengths(spec, build(values), maximum)


def _in_range(kind: str, values: list[float]) -> bool:
    """Whether the numbers of a spec make sense: lengths >= 1, spreads >= 0, ends in order."""
    if kind in ("normal", "lognormal"):
        return values[0] >= 1 and values[1] >= 0 and all(value >= 1 for value in values[2:])
    if kind == "zipf":
        return values[0] > 0 and 1 <= values[1] <= 10_000_000
    return values[0] >= 1 and values == sorted(values)


def _numbers(spec: str, rest: str, form: str) -> list[float]:
    try:
        values = [float(part) for part in rest.split(":")]
    except ValueError:
        raise WorkloadError(f"length spec '{spec}' has something that is no number; write {form}.") from None
    if not all(math.isfinite(value) and abs(value) < 2**31 for value in values):
        raise WorkloadError(f"length spec '{spec}' has a number out of range; write it as {form}.")
    return values


def _empirical(spec: str, rest: str) -> Lengths:
    if "," in rest or rest.isdigit():
        parts = rest.split(",")
        places = [f"value {i + 1} of '{spec}'" for i in range(len(parts))]
    else:
        path = Path(rest)
        try:
            lines = path.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise WorkloadError(f"cannot read the lengths in '{rest}': {error}.") from None
        numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        parts = [line for _, line in numbered]
        places = [f"{path}, line {number}, field length" for number, _ in numbered]
    for place, part in zip(places, parts, strict=True):
        if not part.strip().isascii() or not part.strip().isdigit() or int(part) < 1:
            raise WorkloadError(f"{place}: '{part.strip()}' is no whole number of at least 1.")
    if not parts:
        raise WorkloadError(f"length spec '{spec}' has no values; write empirical:A,B,C or empirical:FILE.")
    values = np.array([int(part) for part in parts], dtype=np.float64)
    return Lengths(spec, lambda generator, count: values[generator.integers(len(values), size=count)])


def _zipf(values: list[float]) -> Draw:
    weights = np.arange(1, int(values[1]) + 1, dtype=np.float64) ** -values[0]
    cumulative = np.cumsum(weights) / weights.sum()

    def draw(generator: np.random.Generator, count: int) -> NDArray[np.float64]:
        ranks = np.searchsorted(cumulative, generator.random(count), side="right") + 1
        return np.minimum(ranks, len(cumulative)).astype(np.float64)

    return draw


def _fixed(values: list[float]) -> Draw:
    return lambda generator, count: np.full(count, values[0])


def _uniform(values: list[float]) -> Draw:
    low, high = int(values[0]), int(values[1])
    return lambda generator, count: generator.integers(low, high + 1, size=count).astype(np.float64)


def _normal(values: list[float]) -> Draw:
    return lambda generator, count: values[0] + values[1] * generator.standard_normal(count)


def _lognormal(values: list[float]) -> Draw:
    # The cap keeps a wild sigma from overflowing; Lengths.sample clips far below it.
    return lambda generator, count: np.exp(
        np.minimum(math.log(values[0]) + values[1] * generator.standard_normal(count), 50.0)
    )


_FORMS: dict[str, tuple[str, int, Callable[[list[float]], Draw]]] = {
    "fixed": ("fixed:N", 1, _fixed),
    "uniform": ("uniform:LOW:HIGH", 2, _uniform),
    "normal": ("normal:MEAN:STD[:MAX]", 2, _normal),
    "lognormal": ("lognormal:MEDIAN:SIGMA[:MAX]", 2, _lognormal),
    "zipf": ("zipf:EXPONENT:MAX", 2, _zipf),
}
