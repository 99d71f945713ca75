"""Charts as SVG that needs no script: marks on two axes, drawn once and stretched to whatever width there is.

A chart's own `<svg>` is the plot area; labels lie outside of it, so texts keep their size at every width.
Lines stand in an inner box of 1000 x 1000 that is stretched; all else is placed by percentages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from json import dumps
from typing import Any, Protocol

import numpy as np

from backbench.errors import printable
from backbench.reports.page.axes import Axis, tick_text
from backbench.reports.page.style import RunStyle

BOX = 1000
"""The side of the box that lines are drawn in."""
CHARACTER = 6.6
"""Width of a digit of a tick's label in pixels."""
STRIP = 0.1
"""Share of the height up to which a shade is a strip, which has to be darker to be seen."""
MARKERS = 5
"""Shapes along a line, so that it is known without its colour."""


class Mark(Protocol):
    """What stands on a chart."""

    def stretched(self, x: Axis, y: Axis) -> str:
        """SVG in the box of 1000 x 1000."""

    def placed(self, x: Axis, y: Axis) -> str:
        """SVG placed by percentages."""


@dataclass(frozen=True)
class Line:
    """One run's line; with `steps`, right and then up, as an ECDF goes."""

    x: np.ndarray
    y: np.ndarray
    style: RunStyle
    name: str = ""
    """What a tooltip calls it; the run's label where empty."""
    id: str = ""
    """Of its path where several charts show it: `shared_paths` holds the path, and charts refer to it."""
    steps: bool = False
    thin: bool = False
    markers: bool = False

    def path(self, x: Axis, y: Axis) -> str:
        """The path's data; a value that is not there interrupts it."""
        whole = np.isfinite(self.x) & np.isfinite(self.y)
        right, down = _box(x.place(self.x), y.place(self.y))
        parts, pen_down = [], False
        for there, a, b in zip(whole, right, down, strict=True):
            if there:
                parts.append(f"H{a}V{b}" if pen_down and self.steps else f"{'L' if pen_down else 'M'}{a} {b}")
            pen_down = bool(there)
        return "".join(parts)

    def stretched(self, x: Axis, y: Axis) -> str:
        name = svg_text(self.name or self.style.label)
        dash = "solid" if self.id else self.style.dash  # alone in its chart, it needs no other sign
        kind = f"line dash-{dash}{' thin' if self.thin else ''}"
        drawn = f'<use href="#{self.id}"/>' if self.id else f'<path d="{self.path(x, y)}"/>'
        return f'<g class="{kind}" style="color:{self.style.color}" data-name="{name}">{drawn}</g>'

    def placed(self, x: Axis, y: Axis) -> str:
        if not (self.markers and len(self.x)):
            return ""
        keep = np.unique(np.linspace(0, len(self.x) - 1, MARKERS + 2).round().astype(int))[1:-1]
        pairs = zip(x.place(self.x[keep]), y.place(self.y[keep]), strict=True)
        return "".join(shape(self.style, a, b) for a, b in pairs if np.isfinite(a + b))


@dataclass(frozen=True)
class Ghosts:
    """The lines of all runs in grey, behind one run's."""

    id: str

    def stretched(self, x: Axis, y: Axis) -> str:
        return f'<use class="ghost" href="#{self.id}"/>'

    def placed(self, x: Axis, y: Axis) -> str:
        return ""


@dataclass(frozen=True)
class Band:
    """From the least to the most, behind a line of means."""

    x: np.ndarray
    low: np.ndarray
    high: np.ndarray
    style: RunStyle

    def stretched(self, x: Axis, y: Axis) -> str:
        ends = zip(*_box(x.place(self.x), y.place(self.high)), strict=True)
        back = zip(*_box(x.place(self.x[::-1]), y.place(self.low[::-1])), strict=True)
        points = "L".join(f"{a} {b}" for a, b in (*ends, *back))
        return f'<path class="band" style="color:{self.style.color}" d="M{points}Z"/>'

    def placed(self, x: Axis, y: Axis) -> str:
        return ""


@dataclass(frozen=True)
class Dots:
    """Many small round points."""

    x: np.ndarray
    y: np.ndarray
    style: RunStyle

    def stretched(self, x: Axis, y: Axis) -> str:
        pairs = zip(*_box(x.place(self.x), y.place(self.y)), strict=True)
        dots = "".join(f"M{a} {b}h0" for a, b in pairs)
        return f'<path class="dots" style="color:{self.style.color}" d="{dots}"/>'

    def placed(self, x: Axis, y: Axis) -> str:
        return ""


@dataclass(frozen=True)
class Shade:
    """A region: between two values of x, and of the height between two shares of it."""

    left: float
    right: float
    label: str
    bottom: float = 0.0
    top: float = 1.0
    style: RunStyle | None = None
    """Whose it is; None = nobody's."""

    def stretched(self, x: Axis, y: Axis) -> str:
        return ""

    def placed(self, x: Axis, y: Axis) -> str:
        a, b = 100 * x.place([self.left, self.right])
        look = f' style="color:{self.style.color}"' if self.style else ""
        box = f'x="{a:.2f}%" width="{b - a:.2f}%" y="{100 - 100 * self.top:.1f}%"'
        height = f'height="{100 * (self.top - self.bottom):.1f}%"'
        kind = "shade" if self.top - self.bottom > STRIP else "shade strip"
        return f'<rect class="{kind}"{look} {box} {height}><title>{svg_text(self.label)}</title></rect>'


@dataclass(frozen=True)
class Point:
    """A value with its intervals, a label beside it, and what a tooltip says."""

    x: float
    y: float
    style: RunStyle
    tip: str
    x_interval: tuple[float, float] | None = None
    y_interval: tuple[float, float] | None = None
    label: str = ""

    def stretched(self, x: Axis, y: Axis) -> str:
        return ""

    def placed(self, x: Axis, y: Axis) -> str:
        right, up = float(x.place(self.x)), float(y.place(self.y))
        parts = []
        if self.x_interval:
            a, b = 100 * x.place(self.x_interval)
            parts.append(_whisker(x1=a, x2=b, y1=100 - 100 * up, y2=100 - 100 * up))
        if self.y_interval:
            a, b = 100 - 100 * y.place(self.y_interval)
            parts.append(_whisker(x1=100 * right, x2=100 * right, y1=a, y2=b))
        parts.append(shape(self.style, right, up, "large"))
        if self.label:
            left = right > 0.8
            place = f'x="{100 * right:.2f}%" y="{100 - 100 * up:.2f}%" dx="{-9 if left else 9}" dy="-7"'
            anchor = ' text-anchor="end"' if left else ""
            parts.append(f'<text class="beside" {place}{anchor}>{svg_text(self.label)}</text>')
        tip = svg_text(self.tip)
        look = f'class="point" style="color:{self.style.color}"'
        return f'<g {look} data-tip="{tip}"><title>{tip}</title>{"".join(parts)}</g>'


@dataclass(frozen=True)
class Chart:
    """Marks on two axes."""

    x: Axis
    y: Axis
    marks: tuple[Mark, ...]
    title: str = ""
    style: RunStyle | None = None
    """The run it is about, where it is about one."""
    height: int = 200
    """Of the plot area in pixels."""
    titled: bool = False
    """A title near by names the quantity: the axis gives its unit alone."""

    @property
    def margins(self) -> tuple[int, int, int, int]:
        """Top, right, bottom, left of the plot area in pixels, where its labels are."""
        widest = max(len(tick_text(value, self.y)) for value in self.y.ticks)
        return 28, 14, 42, round(14 + CHARACTER * widest)

    def body(self) -> str:
        """What stands inside the plot area's `<svg>`, and around it."""
        lines = "".join(mark.stretched(self.x, self.y) for mark in self.marks)
        box = f'viewBox="0 0 {BOX} {BOX}" preserveAspectRatio="none" width="100%" height="100%"'
        stretched = f'<svg class="box" {box}>{lines}</svg>'
        shades = "".join(mark.placed(self.x, self.y) for mark in self.marks if isinstance(mark, Shade))
        placed = "".join(mark.placed(self.x, self.y) for mark in self.marks if not isinstance(mark, Shade))
        return shades + self._grid() + stretched + placed

    def data(self) -> str:
        """Attributes that let a script turn a place back into values."""
        ends = [
            [axis.low, axis.high, axis.log, axis.unit, axis.quantity if axis is self.x else ""]
            for axis in (self.x, self.y)
        ]
        return f'data-axes="{escape(dumps(ends, ensure_ascii=False))}"'

    def _grid(self) -> str:
        parts = []
        for value in self.y.ticks:
            up = f"{100 - 100 * float(self.y.place(value)):.2f}%"
            parts.append(f'<line x1="0" x2="100%" y1="{up}" y2="{up}"/>')
            parts.append(f'<text x="-7" y="{up}" dy=".32em" class="end">{tick_text(value, self.y)}</text>')
        for value in self.x.ticks:
            right = f"{100 * float(self.x.place(value)):.2f}%"
            parts.append(f'<line x1="{right}" x2="{right}" y1="100%" y2="100%" class="tick"/>')
            parts.append(
                f'<text x="{right}" y="100%" dy="17" class="middle">{tick_text(value, self.x)}</text>'
            )
        left = self.margins[3]
        name = self.y.unit if self.titled else self.y.label
        parts.append(f'<text x="{-left}" y="0" dy="-12" class="name">{svg_text(name)}</text>')
        parts.append(f'<text x="100%" y="100%" dy="36" class="name end">{svg_text(self.x.label)}</text>')
        return f'<g class="axes">{"".join(parts)}</g>'


def shared_paths(id: str, lines: Sequence[Line], x: Axis, y: Axis) -> str:
    """A group with the path of every line, for `Ghosts` and for lines that have an id."""
    # An attribute: a rule of a style sheet does not reach every copy that a `use` makes.
    still = 'vector-effect="non-scaling-stroke"'
    paths = "".join(f'<path id="{line.id}" {still} d="{line.path(x, y)}"/>' for line in lines)
    return f'<g id="{id}">{paths}</g>'


def shape(style: RunStyle, right: float, up: float, size: str = "shape") -> str:
    """A run's own shape at shares of the plot from its lower left; `size` may be "large"."""
    place = f'x="{100 * right:.2f}%" y="{100 - 100 * up:.2f}%"'
    return f'<use class="shape" href="#{size}-{style.shape}" {place} style="color:{style.color}"/>'


def _whisker(**ends: float) -> str:
    return "<line class='whisker' " + " ".join(f'{name}="{at:.2f}%"' for name, at in ends.items()) + "/>"


def _box(right: np.ndarray, up: np.ndarray) -> tuple[list[str], list[str]]:
    """Coordinates in the box, to a tenth of its thousandths."""

    def texts(shares: Any) -> list[str]:
        return [f"{BOX * each:.1f}".removesuffix(".0") for each in shares]

    return texts(right), texts(1 - up)


def svg_text(text: str) -> str:
    """Any text as it may stand in SVG: nothing in it is markup or a control character."""
    return escape(printable(text))
