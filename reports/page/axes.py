"""A chart's axis: its range, its round ticks, and where a value stands on it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, floor, log10
from typing import Any

import numpy as np

MOST_TICKS = 9
"""More labels than this run into each other on a phone."""
LOG_FROM = 20.0
"""Most over least from which a logarithmic axis shows what a linear one would hide."""


@dataclass(frozen=True)
class Axis:
    """A range of values. `place` maps it onto 0 to 1."""

    label: str
    """What it counts, with the unit in brackets."""
    low: float
    high: float
    log: bool = False
    ticks: tuple[float, ...] = ()

    def place(self, values: Any) -> np.ndarray:
        """0 at the low end, 1 at the high end; nothing lies outside."""
        found = np.asarray(values, dtype=float)
        low, high = self.low, self.high
        if self.log:
            found, low, high = np.log10(np.maximum(found, low)), log10(low), log10(high)
        placed: np.ndarray = np.clip((found - low) / (high - low), 0.0, 1.0)
        return placed

    @property
    def quantity(self) -> str:
        """The label without its unit."""
        return self.label.split(" (")[0]

    @property
    def unit(self) -> str:
        """What the label has in brackets, without a word on the scale."""
        return self.label.partition(" (")[2].rstrip(")").split(", log")[0]


def linear(label: str, values: Iterable[float], zero: bool = True, ticks: int = 5) -> Axis:
    """Round ends and steps of 1, 2 or 5 times a power of ten; from 0 unless asked otherwise."""
    known = _known(values)
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    low = min(low, 0.0) if zero else low
    high = high if high > low else low + (abs(low) or 1.0)
    step = round_up((high - low) / ticks)
    first, last = floor(low / step + 1e-9), ceil(high / step - 1e-9)
    marks = tuple(float(f"{place * step:.12g}") for place in range(first, last + 1))
    return Axis(label, marks[0], marks[-1], ticks=marks)


def logarithmic(label: str, values: Iterable[float]) -> Axis:
    """Ticks at 1, 2, 5, 10, 20, ..., thinned to powers of ten where those are too many."""
    known = _known(values)
    known = known[known > 0]
    low, high = float(known.min()), float(known.max())
    decades = range(floor(log10(low)) - 1, ceil(log10(high)) + 2)
    marks = [float(f"{step}e{decade}") for decade in decades for step in (1, 2, 5)]
    start = max((place for place, mark in enumerate(marks) if mark <= low), default=0)
    end = next(place for place, mark in enumerate(marks) if mark >= high and place > start)
    shown = marks[start : end + 1]
    if len(shown) > MOST_TICKS:
        shown = [mark for mark in shown if f"{mark:e}".startswith("1.0")]
    return Axis(f"{label[:-1]}, log scale)", marks[start], marks[end], log=True, ticks=tuple(shown))


def fitting(label: str, values: Iterable[float]) -> Axis:
    """Logarithmic where all is positive and spans more than a factor of 20, else linear from 0."""
    known = _known(values)
    wide = len(known) and known.min() > 0 and known.max() / known.min() > LOG_FROM
    return logarithmic(label, known) if wide else linear(label, known)


def round_up(value: float) -> float:
    """The least of 1, 2, 5, 10, ... times a power of ten that is not below `value`."""
    power = 10.0 ** floor(log10(value))
    return float(next(step * power for step in (1, 2, 5, 10) if step * power >= value * (1 - 1e-9)))


def tick_text(value: float, axis: Axis) -> str:
    """As many decimals as tell the ticks apart: "0.05", "20", "1,000"."""
    step = value if axis.log else axis.ticks[1] - axis.ticks[0]
    decimals = max(0, -floor(log10(step) + 1e-9)) if step else 0
    return f"{value:,.{decimals}f}"


def _known(values: Iterable[float]) -> np.ndarray:
    found = np.asarray(values if isinstance(values, np.ndarray) else list(values), dtype=float)
    known: np.ndarray = found[np.isfinite(found)]
    return known
