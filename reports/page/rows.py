"""Bars in rows: a name, a bar with its interval, and what there is to say about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from backbench.reports.page.axes import Axis
from backbench.reports.page.chart import svg_text
from backbench.reports.page.style import RunStyle

ROW = 60
"""Height of a row in pixels."""
LONGEST_NAME = 46
"""Characters that fit beside a phone's edges."""


@dataclass(frozen=True)
class Row:
    """One bar, from 0 to `value`."""

    style: RunStyle
    value: float
    interval: tuple[float, float] | None
    text: str
    """The value in words, with its interval."""
    note: str = ""
    """What else is known, e.g. the ratio."""


@dataclass(frozen=True)
class Rows:
    """The bars of a figure, one below the other on one axis."""

    axis: Axis
    rows: Sequence[Row]
    title: str = ""
    style: RunStyle | None = None

    margins = (4, 14, 4, 0)

    @property
    def height(self) -> int:
        """In pixels."""
        return ROW * len(self.rows)

    def data(self) -> str:
        """No place between the bars has a value."""
        return ""

    def body(self) -> str:
        """SVG of all rows."""
        return "".join(self._row(place, row) for place, row in enumerate(self.rows))

    def _row(self, place: int, row: Row) -> str:
        top = ROW * place
        color = f'style="color:{row.style.color}"'
        name = row.style.label
        name = name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"
        shape = f'<use class="shape" href="#shape-{row.style.shape}" x="6" y="{top + 12}" {color}/>'
        head = f'<text class="row-name" x="18" y="{top + 16}">{svg_text(name)}</text>'
        long = f"{100 * float(self.axis.place(row.value)):.2f}%"
        bar = f'<rect class="long" {color} y="{top + 24}" width="{long}" height="12" rx="3"/>'
        whisker = ""
        if row.interval:
            a, b = (f"{100 * float(end):.2f}%" for end in self.axis.place(row.interval))
            middle = top + 30
            ends = "".join(
                f'<line x1="{at}" x2="{at}" y1="{middle - 5}" y2="{middle + 5}"/>' for at in (a, b)
            )
            line = f'<line x1="{a}" x2="{b}" y1="{middle}" y2="{middle}"/>'
            whisker = f'<g class="halo">{line}{ends}</g><g class="whisker">{line}{ends}</g>'
        said = f'<tspan class="row-value">{svg_text(row.text)}</tspan>'
        said += f" {svg_text(row.note)}" if row.note else ""
        return f'{shape}{head}{bar}{whisker}<text class="row-note" x="0" y="{top + 51}">{said}</text>'
