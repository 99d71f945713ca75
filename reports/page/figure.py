"""A figure: charts with a caption, the words for who cannot see it, and the numbers it draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from backbench.reports.page.chart import Chart, Dots, Line, Point, svg_text
from backbench.reports.page.rows import Rows
from backbench.reports.page.style import SHAPES, RunStyle
from backbench.reports.quantities import digits
from backbench.reports.tables import Cell, Table

CHART_STYLE = Path(__file__).parent / "templates" / "chart.css"
LISTED = 9
"""Places of a line that the table beneath the figure lists."""
WIDTH = 760
"""Of an exported figure in pixels."""


@dataclass(frozen=True)
class Figure:
    """One or several charts that belong together."""

    id: str
    section: str
    """Where it stands on the page."""
    title: str
    caption: str
    alt: str
    charts: tuple[Chart | Rows, ...]
    legend: tuple[RunStyle, ...] = ()
    defs: str = ""
    """Paths that several of the charts show."""
    columns: int = 1
    """Charts beside each other where there is room."""

    @property
    def numbers(self) -> Table | None:
        """What the marks stand for, thinned to a few places a line; None where the figure writes it out."""
        rows = [row for chart in self.charts if isinstance(chart, Chart) for row in _listed(chart)]
        if not rows:
            return None
        columns = ("Run", "Along", "At", "What", "Value")
        return Table(f"{self.title}: numbers", columns, tuple(rows))


def _listed(chart: Chart) -> list[tuple[Cell, ...]]:
    found: list[tuple[Cell, ...]] = []
    for mark in chart.marks:
        if isinstance(mark, Point):
            xs, ys, name = np.array([mark.x]), np.array([mark.y]), mark.style.label
        elif isinstance(mark, Line | Dots) and len(mark.x):
            keep = np.unique(np.linspace(0, len(mark.x) - 1, LISTED).round().astype(int))
            xs, ys = mark.x[keep], mark.y[keep]
            name = (mark.name if isinstance(mark, Line) else "") or mark.style.label
        else:
            continue
        for x, y in zip(xs.tolist(), ys.tolist(), strict=True):
            at, value = f"{digits(x)} {chart.x.unit}", f"{digits(y)} {chart.y.unit}"
            found.append(
                (
                    Cell(name, sort=name),
                    Cell(chart.x.quantity, sort=chart.x.quantity),
                    Cell(at, sort=x),
                    Cell(chart.title or chart.y.quantity, sort=chart.title),
                    Cell(value, sort=y),
                )
            )
    return found


def shape_definitions() -> str:
    """The runs' shapes in two sizes, for charts and legends to refer to."""
    sizes = (("shape", ""), ("large", ' transform="scale(1.5)"'))
    return "".join(
        f'<path id="{name}-{place}" d="{path}"{scaled}/>'
        for name, scaled in sizes
        for place, path in enumerate(SHAPES)
    )


def standalone(figure: Figure, styles: Sequence[RunStyle]) -> str:
    """The figure as an SVG file of its own, in light or dark as its reader prefers."""
    parts: list[str] = []
    top = 30
    if len(figure.legend) > 1:
        top = _legend(figure.legend, parts, top)
    columns = min(figure.columns, len(figure.charts))
    cell = WIDTH / columns
    for start in range(0, len(figure.charts), columns):
        line = figure.charts[start : start + columns]
        titled = 18 if any(each.title for each in line) else 0
        for place, chart in enumerate(line):
            above, right, _, left = chart.margins
            x, y, wide = place * cell + left, top + titled + above, cell - left - right
            if chart.title:
                parts.append(
                    f'<text class="title" x="{place * cell:g}" y="{top + 12}">{svg_text(chart.title)}</text>'
                )
            box = f'x="{x:g}" y="{y}" width="{wide:g}" height="{chart.height}" overflow="visible"'
            parts.append(f'<svg class="chart" {box}>{chart.body()}</svg>')
        top += titled + max(each.margins[0] + each.height + each.margins[2] for each in line) + 12
    light = "".join(f"{each.variable}:{each.light};" for each in styles)
    dark = "".join(f"{each.variable}:{each.dark};" for each in styles)
    css = CHART_STYLE.read_text(encoding="utf-8")
    css += f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH + 24}" height="{top + 12}" '
        f'viewBox="-12 0 {WIDTH + 24} {top + 12}" role="img" class="standalone">'
        f"<title>{svg_text(figure.title)}</title><desc>{svg_text(figure.alt)}</desc><style>{css}</style>"
        f'<rect class="paper" x="-12" width="100%" height="100%"/>'
        f"<defs>{shape_definitions()}{figure.defs}</defs>"
        f'<text class="heading" x="0" y="20">{svg_text(figure.title)}</text>{"".join(parts)}</svg>\n'
    )


def _legend(styles: Sequence[RunStyle], parts: list[str], top: int) -> int:
    """Names beside their shapes, as many a line as fit; returns where the next thing goes."""
    left = 0.0
    for each in styles:
        wide = 28 + 6.5 * len(each.label[:60])
        if left and left + wide > WIDTH:
            left, top = 0.0, top + 18
        mark = f'<use class="shape" href="#shape-{each.shape}" x="{left + 6:g}" y="{top + 10}"'
        parts.append(f'{mark} style="color:{each.color}"/>')
        parts.append(
            f'<text class="title" x="{left + 16:g}" y="{top + 14}">{svg_text(each.label[:60])}</text>'
        )
        left += wide
    return top + 26
