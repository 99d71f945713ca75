"""Figures of all runs at once, one mark a run: the ranking, the front, and the history of gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from backbench.reports.arms import Arm, against, measured
from backbench.reports.compare import backend_name, show
from backbench.reports.conclusion import judged_quantity
from backbench.reports.metrics.metric import Quantity
from backbench.reports.page.axes import Axis, fitting, linear
from backbench.reports.page.chart import Chart, Line, Mark, Point, Shade
from backbench.reports.page.figure import Figure
from backbench.reports.page.rows import Row, Rows
from backbench.reports.page.run_data import RunData
from backbench.reports.page.style import RunStyle
from backbench.reports.quantities import (
    Reading,
    digits,
    format_interval,
    format_value,
    quantity,
    scale,
)
from backbench.reports.record import RunRecord

MOST_DRAWN = 24
"""Runs that have figures of their own; more make a page nobody reads to its end."""

USER = quantity("metrics", "interactivity_tokens_per_s", "p50")
TTFT = quantity("metrics", "ttft_s", "p50")
JOULES = quantity("energy", "joules_per_output_token")


def ranked(runs: Sequence[RunData]) -> list[RunData]:
    """The best first by the quantity that decides who is fastest; those without a value last."""
    arms = [run.sample for run in runs]
    wanted = judged_quantity(arms)

    def loss(run: RunData) -> float:
        value = against(arms[0], run.sample, wanted).value
        if value is None:
            return float("inf")
        return -value if wanted.higher_is_better else value

    return sorted(runs, key=loss)


def chosen(runs: Sequence[RunData], comparable: bool) -> list[RunData]:
    """The runs that are drawn, in their order: of too many the best, and the reference."""
    if len(runs) <= MOST_DRAWN:
        return list(runs)
    kept = [id(run) for run in (ranked(runs) if comparable else runs)[: MOST_DRAWN - 1]]
    return [run for place, run in enumerate(runs) if place == 0 or id(run) in kept]


def ranking_figure(runs: Sequence[RunData]) -> Figure | None:
    """A bar a run, the best first, with its interval and the ratio to the reference."""
    arms = [run.sample for run in runs]
    wanted = judged_quantity(arms)
    known = [(run, measured(run.sample, wanted)) for run in ranked(runs)]
    found = [(run, reading, reading.value) for run, reading in known if reading.value is not None]
    if not found:
        return None
    shown = found[:MOST_DRAWN]
    rows = [_row(run, reading, value, arms[0], wanted) for run, reading, value in shown]
    factor, unit = scale(max(row.value for row in rows), wanted.unit)
    reach = [end for row in rows for end in (row.value, *(row.interval or ()))]
    axis = linear(f"{wanted.label} ({unit})", [end / factor for end in reach])
    scaled = [_scaled(row, factor) for row in rows]
    better = "longer" if wanted.higher_is_better else "shorter"
    title = f"Ranking by {wanted.label}"
    left_out = (
        f" The best {len(shown)} of {len(found)}; the scorecard has all." if len(shown) < len(found) else ""
    )
    caption = f"{better.capitalize()} is better. Ratios are to {arms[0].label}.{left_out}"
    alt = f"{title}: " + "; ".join(f"{row.style.label} {row.text} {row.note}" for row in rows) + "."
    return Figure("ranking", "ranking", title, caption, alt, (Rows(axis, scaled),))


def _row(run: RunData, reading: Reading, value: float, reference: Arm, wanted: Quantity) -> Row:
    text, interval = format_value(value, wanted.unit), format_interval(reading, wanted.unit)
    note = "the reference" if run.sample is reference else str(against(reference, run.sample, wanted))
    ends = _ends(reading)
    return Row(
        run.style, value, ends, text + (f" ({interval})" if interval else ""), f"· {note}" if note else ""
    )


def _ends(reading: Reading) -> tuple[float, float] | None:
    return None if reading.low is None or reading.high is None else (reading.low, reading.high)


def _scaled(row: Row, factor: float) -> Row:
    ends = None if row.interval is None else (row.interval[0] / factor, row.interval[1] / factor)
    return replace(row, value=row.value / factor, interval=ends)


Ends = tuple[float, tuple[float, float] | None]
"""A value and its interval."""


@dataclass(frozen=True)
class Side:
    """One way to read an axis of the front."""

    label: str
    """With its unit; output tokens, always."""
    wanted: Quantity
    inverse: bool = False
    """One over the quantity: tokens per joule, which is tok/s per watt."""
    factor: float = 1.0
    """Of the axis' unit in the quantity's."""

    def read(self, arm: Arm) -> Ends | None:
        """The arm's value and interval on this axis."""
        reading = measured(arm, self.wanted)
        value, ends = reading.value, _ends(reading)
        if value is None or not value > 0:
            return None
        if not self.inverse:
            return value / self.factor, ends and (ends[0] / self.factor, ends[1] / self.factor)
        return 1 / value, (1 / ends[1], 1 / ends[0]) if ends and min(ends) > 0 else None

    def scaled(self, least: float) -> Side:
        """In the unit in which `least` reads well: ms for a time of a few."""
        if self.wanted.unit != "s":
            return self
        factor, unit = scale(least, "s")
        return replace(self, factor=factor, label=self.label.replace("(s)", f"({unit})"))


def front_figures(runs: Sequence[RunData]) -> list[Figure]:
    """Output rate against what a user sees: tokens a second, TTFT, and the rate per watt."""
    per_gpu = [
        quantity("metrics", "output_tokens_per_s_per_gpu", part) for part in ("steady_state", "whole_run")
    ]
    whole = [quantity("metrics", "output_tokens_per_s", part) for part in ("steady_state", "whole_run")]
    arms = [run.sample for run in runs]

    def everywhere(wanted: Quantity) -> bool:
        return all(len(arm.values(wanted)) == len(arm.runs) for arm in arms)

    rate = next((each for each in (*per_gpu, *whole) if everywhere(each)), whole[1])
    gpu = "/GPU" if rate in per_gpu else ""
    stretch = "in steady state" if rate.path[-1] == "steady_state" else "over the whole run"
    upward = Side(f"Output rate {stretch} (output tok/s{gpu})", rate)
    user = Side("Speed a user sees, median (output tok/s/user)", USER)
    watt = Side("Output rate per watt (output tok/s/W)", JOULES, inverse=True)
    wanted = (
        ("front", "against a user's speed", user, upward, ("tpot", False)),
        ("front-ttft", "against TTFT", Side("TTFT, median (s)", TTFT), upward, ("ttft", True)),
        ("front-watt", "per watt", user, watt, ("tpot", False)),
    )
    found = [_front(*each, runs) for each in wanted]
    return [each for each in found if each is not None]


def _front(
    id: str, title: str, across: Side, upward: Side, limit: tuple[str, bool], runs: Sequence[RunData]
) -> Figure | None:
    read = [(run, across.read(run.sample), upward.read(run.sample)) for run in runs]
    known = [(run, x, y) for run, x, y in read if x and y]
    if len(known) < 2:
        return None
    across = across.scaled(min(x[0] for _, x, _ in known))
    groups: dict[tuple[str, ...], list[tuple[RunData, Ends, Ends]]] = {}
    for run, _, y in known:
        if x := across.read(run.sample):
            groups.setdefault(configuration_of(run.record), []).append((run, x, y))
    marks: list[Mark] = []
    legend: list[RunStyle] = []
    for members in groups.values():
        members.sort(key=lambda each: load(each[0].record)[0])
        styles = [run.style for run, _, _ in members]
        if len(members) > 1 and len({load(run.record)[0] for run, _, _ in members}) == len(members):
            styles = styles[:1] * len(members)
            xs, ys = zip(*((x[0], y[0]) for _, x, y in members), strict=True)
            marks.append(_path(xs, ys, styles[0]))
        each_with_style = zip(members, styles, strict=True)
        marks += [_point(run, style, across, upward, x, y) for (run, x, y), style in each_with_style]
        legend += dict.fromkeys(styles)
    points = [mark for mark in marks if isinstance(mark, Point)]
    loads = {point.label for point in points}
    if len(loads) == 1:
        marks = [replace(mark, label="") if isinstance(mark, Point) else mark for mark in marks]
    x_axis = _points_axis(across.label, [end for p in points for end in (p.x, *(p.x_interval or ()))])
    y_axis = _points_axis(upward.label, [end for p in points for end in (p.y, *(p.y_interval or ()))])
    region = _slo_region(runs, *limit, across.factor, x_axis)
    where = f"all at {loads.pop()}" if len(loads) == 1 else "labelled with its load"
    whiskers = "; whiskers are 95 % intervals" if any(p.x_interval or p.y_interval for p in points) else ""
    caption = f"One point each, {where}{whiskers}."
    caption += f" {region.label}." if region else ""
    chart = Chart(x_axis, y_axis, (*((region,) if region else ()), *marks), height=320)
    better = "lower left" if limit[1] else "upper right"
    alt = f"{upward.label} {title}: " + "; ".join(point.tip for point in points[:12]) + "."
    caption += f" Better is towards the {'upper left' if better == 'lower left' else better}."
    return Figure(id, "front", title[0].upper() + title[1:], caption, alt, (chart,), tuple(legend))


def _points_axis(label: str, values: Sequence[float]) -> Axis:
    """From 0 or logarithmic; where that pushes all points into a corner, a tenth around them at least."""
    low, high = min(values), max(values)
    return linear(label, [0.9 * low, 1.1 * high], zero=False) if high < 2 * low else fitting(label, values)


def _path(xs: Sequence[float], ys: Sequence[float], style: RunStyle) -> Line:
    import numpy as np

    return Line(np.array(xs), np.array(ys), style, thin=True)


def _point(run: RunData, style: RunStyle, across: Side, upward: Side, x: Ends, y: Ends) -> Point:
    words = load(run.record)[1]
    values = f"{digits(y[0])} {_unit(upward)} at {digits(x[0])} {_unit(across)}"
    tip = f"{run.style.label}, {words}: {values}"
    return Point(x[0], y[0], style, tip, x[1], y[1], words)


def _unit(side: Side) -> str:
    return side.label.partition(" (")[2].rstrip(")")


def configuration_of(record: RunRecord) -> tuple[str, ...]:
    """What stays the same along one line of the front, on which only the load changes."""
    device = record.system.get("device")
    name = device.get("name") if isinstance(device, dict) else None
    return (
        backend_name(record),
        show(name),
        show(record.model.get("name")),
        show(record.model.get("dtype")),
        show(record.model.get("quantization")),
    )


def load(record: RunRecord) -> tuple[float, str]:
    """How much was asked of the engine: a number to sort by, and in words."""
    context = record.metrics.get("context") or {}
    if context.get("concurrency"):
        return float(context["concurrency"]), f"{context['concurrency']:,} at once"
    intended = (record.metrics.get("counts") or {}).get("intended") or 0
    if context.get("mode") == "all_at_once":
        return float(intended), f"{intended:,} at once"
    offered = ((record.workload.get("parameters") or {}).get("offered") or {}).get("rate")
    rate = offered or record.schedule.get("offered_requests_per_s") or 0.0
    return float(rate), f"{digits(rate)} req/s" if rate else "load unknown"


def _slo_region(runs: Sequence[RunData], name: str, below: bool, factor: float, axis: Axis) -> Shade | None:
    """Where a limit that all runs state holds; a user's speed is one over the time per token."""
    limits = {((run.record.metrics.get("context") or {}).get("slo_s") or {}).get(name) for run in runs}
    limit = limits.pop() if len(limits) == 1 else None
    if not limit:
        return None
    edge = limit / factor if below else 1 / limit
    left, right = (axis.low, edge) if below else (edge, axis.high)
    if not axis.low < right or not left < axis.high:
        return None
    return Shade(left, right, f"Shaded: {name.upper()} within {format_value(limit, 's')}")


def gate_figure(rows: Sequence[Mapping[str, Any]], style: RunStyle) -> Figure | None:
    """Each gate's loss with its interval, oldest first; shaded: within the margin. A chart a metric."""
    metrics = list(dict.fromkeys(row["metric"] for row in rows if row.get("metric")))
    charts = []
    for metric in metrics:
        mine = [row for row in rows if row["metric"] == metric]
        places = linear("Gate, oldest first (number)", [1, len(mine)], ticks=min(len(mine), 6))
        marks: list[Mark] = []
        for number, row in enumerate(mine, 1):
            low, loss, high = (100 * row[key] for key in ("low", "loss", "high"))
            said = f"{row['verdict']}, loss {loss:+.2f} % ({low:+.2f} to {high:+.2f})"
            tip = f"{row['utc']} {row['gate']}: {said}"
            marks.append(Point(number, loss, style, tip, y_interval=(low, high)))
        margin = [sign * 100 * row["margin"] for row in mine for sign in (1, 0)]
        ends = [end for mark in marks if isinstance(mark, Point) for end in mark.y_interval or ()]
        axis = linear("Loss, + is worse (%)", [*ends, *margin])
        allowed = Shade(places.low, places.high, "Within the margin", top=float(axis.place(margin[-2])))
        charts.append(Chart(places, axis, (allowed, *marks), metric, height=140))
    if not charts:
        return None
    caption = (
        "Loss of the candidate against its baseline, 95 % intervals between pairs. Shaded: within the margin."
    )
    return Figure("gates", "gates", "Gate history", caption, caption, tuple(charts), columns=2)
