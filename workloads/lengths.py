"""Length distributions, written as short specs such as `lognormal:512:0.6`.

    fixed:N                       always N
    uniform:LOW:HIGH              both ends included
    normal:MEAN:STD[:MAX]         rounded
    lognormal:MEDIAN:SIGMA[:MAX]  exp(N(ln MEDIAN, SIGMA)), rounded
    zipf:EXPONENT:MAX             P(k) ~ k^-EXPONENT over 1..MAX
    empirical:A,B,C | empirical:FILE   one of the values, each line of FILE (plain or gzipped) one value

Lengths are at least 1 and, where MAX is given, at most MAX.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from backbench.errors import WorkloadError, shown
from backbench.workloads.readers.text import MAXIMUM_TOKENS, is_file, read_lines

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
        raise WorkloadError(f"unknown length distribution {shown(kind)}; {hint}")
    form, required, build = _FORMS[kind]
    values = _numbers(spec, rest, form)
    optional = form.count("[")
    if not required <= len(values) <= required + optional:
        raise WorkloadError(f"length spec {shown(spec)} has {len(values)} numbers; write it as {form}.")
    if not _in_range(kind, values):
        raise WorkloadError(
            f"length spec {shown(spec)} is out of range; write it as {form}, lengths at least 1."
        )
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
        raise WorkloadError(
            f"length spec {shown(spec)} has something that is no number; write {form}."
        ) from None
    if not all(math.isfinite(value) and abs(value) < 2**31 for value in values):
        raise WorkloadError(f"length spec {shown(spec)} has a number out of range; write it as {form}.")
    return values


def _empirical(spec: str, rest: str) -> Lengths:
    if "," in rest or rest.isdigit():
        values = [_listed(spec, place, part) for place, part in enumerate(rest.split(","), 1)]
    else:
        values = _from_file(spec, rest)
    drawn = np.array(values, dtype=np.float64)
    return Lengths(spec, lambda generator, count: drawn[generator.integers(len(drawn), size=count)])


def _listed(spec: str, place: int, part: str) -> int:
    digits = part.strip()
    # Nine digits reach MAXIMUM_TOKENS; a number of thousands of them is not even tried.
    if not re.fullmatch(r"[0-9]{1,9}", digits) or not 1 <= int(digits) <= MAXIMUM_TOKENS:
        problem = f"{shown(digits)} is no whole number between 1 and {MAXIMUM_TOKENS}."
        raise WorkloadError(f"value {place} of {shown(spec)}: {problem}")
    return int(digits)


def _from_file(spec: str, name: str) -> list[int]:
    path = Path(name)
    if not is_file(path):
        # A folder, a pipe, a device without end: nothing that holds a list of values.
        raise WorkloadError(
            f"length spec {shown(spec)} names no list and no file; write empirical:A,B,C or empirical:FILE."
        )
    values = [place.whole("length", line, 1) for place, line in read_lines(path) if line.strip()]
    if not values:
        raise WorkloadError(f"{shown(name, 150)} holds no lengths; write one whole number a line.")
    return values


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
