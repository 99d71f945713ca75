"""The report's figures of single runs: distributions, time series, decode steps.

Up to three runs share a chart; of more each has its own, on the same axes, with the others in grey behind.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from backbench.reports.metrics import decode_fit
from backbench.reports.metrics.latency import Samples
from backbench.reports.metrics.series import (
    POINTS,
    Panel,
    Series,
    decode_points,
    ecdf,
    thinned_points,
)
from backbench.reports.page.axes import Axis, fitting, linear
from backbench.reports.page.chart import Band, Chart, Dots, Ghosts, Line, Mark, Shade, shared_paths
from backbench.reports.page.figure import Figure
from backbench.reports.page.run_data import RunData
from backbench.reports.quantities import digits, format_value

OVERLAID = 3
"""Runs that a reader can tell apart in one chart."""
NAMED = 6
"""Runs whose steady windows a caption names."""
SMALL = 110
"""Height of a small chart in pixels."""


def charts_of(
    id: str, lines: Sequence[Line | None], runs: Sequence[RunData], x: Axis, y: Axis, height: int = 220
) -> tuple[tuple[Chart, ...], str]:
    """One chart of all lines; of more than three, one a run with all behind it, and their paths."""
    present = [(line, run) for line, run in zip(lines, runs, strict=True) if line is not None]
    if len(present) <= OVERLAID:
        return (Chart(x, y, tuple(line for line, _ in present), height=height),), ""
    titled = id.startswith("time")
    charts = tuple(
        Chart(x, y, (*steady_shade(run, id), Ghosts(id), line), run.style.label, run.style, SMALL, titled)
        for line, run in present
    )
    return charts, shared_paths(id, [line for line, _ in present], x, y)


def steady_shade(run: RunData, id: str = "time", place: int = 0, of: int = 1) -> tuple[Mark, ...]:
    """The steady window behind a chart over time; of several runs a strip each at the top."""
    window = run.tables.steady
    if window is None or not id.startswith("time"):
        return ()
    start, end = window.start_ns / 1e9, window.end_ns / 1e9
    bottom, top = (0.0, 1.0) if of == 1 else (1 - 0.05 * (place + 1), 1 - 0.05 * place)
    return (Shade(start, end, f"{run.style.label}: steady from {span(start, end)}", bottom, top, run.style),)


def span(start_s: float, end_s: float) -> str:
    """ "12.0 to 48.3 s"."""
    return f"{digits(start_s)} to {digits(end_s)} s"


def ecdf_figure(
    id: str, title: str, short: str, unit_name: str, runs: Sequence[RunData], samples: list[Samples]
) -> Figure | None:
    """The share of all samples at or below each latency; failures keep the curve below 100 %."""
    shown = [(run, each) for run, each in zip(runs, samples, strict=True) if len(each.values_s)]
    if not shown:
        return None
    factor, unit = time_axis(np.concatenate([each.values_s for _, each in shown]))
    many = len(shown) > OVERLAID
    lines, sentences, ends = [], [], []
    for place, (run, each) in enumerate(shown):
        values, shares = ecdf(each)
        ends += [values[int(0.005 * len(values))] / factor, values[-1] / factor]
        name = f"{id}-{place}" if many else ""
        lines.append(
            Line(
                values / factor,
                100 * shares,
                run.style,
                id=name,
                steps=True,
                markers=1 < len(shown) <= OVERLAID,
            )
        )
        middle = np.quantile(each.values_s, 0.5)
        sentences.append(
            f"{run.style.label}: half of {each.total:,} {unit_name} at or below {format_value(middle, 's')}"
        )
    x = fitting(f"{short} ({unit})", ends)
    y = Axis("Share of samples (%)", 0.0, 100.0, ticks=(0.0, 25.0, 50.0, 75.0, 100.0))
    drawn = [run for run, _ in shown]
    charts, defs = charts_of(id, lines, drawn, x, y)
    missing = sum(each.total - len(each.values_s) for _, each in shown)
    said = f"{len(shown)} runs, each in front of all" if many else "; ".join(sentences)
    caption = f"{said}."
    caption += f" {missing:,} without a value count as infinite." if missing else ""
    if any(len(each.values_s) > POINTS for _, each in shown):
        caption += f" Drawn at {POINTS} equal steps of probability, both ends kept."
    alt = f"Cumulative distribution of {title.lower()}. " + "; ".join(sentences[:OVERLAID]) + "."
    legend = () if many else tuple(run.style for run in drawn)
    return Figure(id, "distributions", title, caption, alt, charts, legend, defs, beside(len(charts)))


def beside(count: int) -> int:
    """How many of so many charts stand in a row: three, but no lone one below."""
    return 2 if count == 4 else min(count, 3)


def time_axis(values_s: np.ndarray) -> tuple[float, str]:
    """The factor and unit in which most of `values_s` read well."""
    middle = float(np.quantile(values_s, 0.5)) if len(values_s) else 1.0
    return (1.0, "s") if middle >= 1 else (1e-3, "ms") if middle >= 1e-3 else (1e-6, "µs")


def over_time_figures(runs: Sequence[RunData], panels: Sequence[Panel]) -> list[Figure]:
    """All quantities of up to three runs in one figure; of more, a figure a quantity. One time axis."""
    if not panels:
        return []
    everything = [series for panel in panels for series in panel.series if series is not None]
    x = linear("Time since the run's start (s)", [series.time_s.max() for series in everything])
    if len(runs) > OVERLAID:
        return [_apart(place, panel, runs, x) for place, panel in enumerate(panels)]
    charts = []
    for panel in panels:
        marks: list[Mark] = []
        for place, (run, series) in enumerate(zip(runs, panel.series, strict=True)):
            marks += steady_shade(run, "time", place, len(runs)) if series is not None else ()
            if series is not None and series.least is not None and series.most is not None:
                marks.append(Band(series.time_s, series.least, series.most, run.style))
        marks += [line for line in _lines("", panel, runs) if line is not None]
        axis = _values_axis(panel)
        charts.append(Chart(x, axis, tuple(marks), panel.title, height=SMALL, titled=True))
    names = ", ".join(panel.title.lower() for panel in panels)
    caption = " ".join(filter(None, ("On one time axis.", _steady_words(runs), _binning(everything))))
    alt = f"Over time: {names}. {_steady_words(runs)}"
    legend = tuple(run.style for run in runs)
    return [Figure("over-time", "time", "Over time", caption, alt, tuple(charts), legend, columns=2)]


def _apart(place: int, panel: Panel, runs: Sequence[RunData], x: Axis) -> Figure:
    id = f"time-{place}"
    charts, defs = charts_of(id, _lines(id, panel, runs), runs, x, _values_axis(panel))
    known = [series for series in panel.series if series is not None]
    steady = _steady_words(runs) if len(runs) <= NAMED else "Shaded: the steady state of each."
    words = (f"{panel.title} of {len(known)} runs, each in front of all.", steady, _binning(known))
    caption = " ".join(filter(None, words))
    return Figure(id, "time", panel.title, caption, caption, charts, (), defs, beside(len(charts)))


def _lines(id: str, panel: Panel, runs: Sequence[RunData]) -> list[Line | None]:
    many = sum(series is not None for series in panel.series) > OVERLAID
    return [
        None
        if series is None
        else Line(
            series.time_s,
            series.values,
            run.style,
            id=f"{id}-line-{place}" if many else "",
            markers=1 < len(runs) <= OVERLAID,
        )
        for place, (run, series) in enumerate(zip(runs, panel.series, strict=True))
    ]


def _values_axis(panel: Panel) -> Axis:
    known = [series for series in panel.series if series is not None]
    ends = [series.values if series.most is None else series.most for series in known]
    return linear(f"{panel.title} ({panel.unit})", np.concatenate(ends), ticks=3)


def _steady_words(runs: Sequence[RunData]) -> str:
    windows = [(run, run.tables.steady) for run in runs]
    known = [
        f"{f'{run.style.label} ' if len(runs) > 1 else ''}{span(window.start_ns / 1e9, window.end_ns / 1e9)}"
        for run, window in windows
        if window is not None
    ]
    return f"Shaded: the steady state, {'; '.join(known)}." if known else ""


def _binning(series: Sequence[Series]) -> str:
    binned = any(each.least is not None for each in series)
    return "Lines are means of equal bins, the bands around them reach from the least to the most." * binned


def decode_figure(runs: Sequence[RunData]) -> Figure | None:
    """Step time against context tokens for steps that only decode, with the fit and its floor."""
    points = [(run, *decode_points(run.tables)) for run in runs]
    shown = [(run, context, 1e3 * seconds) for run, context, seconds in points if len(seconds)]
    if not shown:
        return None
    x = linear("Context tokens in the step (tokens)", [context.max() for _, context, _ in shown])
    y = linear("Step time (ms)", [times.max() for _, _, times in shown])
    charts, sentences, thin = [], [], False
    for run, context, times in shown:
        keep = thinned_points(context, times)
        thin = thin or len(keep) < len(times)
        marks: list[Mark] = [Dots(context[keep], times[keep], run.style)]
        ends = np.array([0.0, context.max()])
        fit = run.record.roofline.get("decode_fit") or {}
        for name in ("fit", "floor"):
            found = decode_fit.line(fit, ends, floor=name == "floor")
            if found is not None:
                words = f"{run.style.label}, {name}"
                marks.append(Line(ends, 1e3 * found, run.style, words, thin=name == "floor"))
        title = run.style.label if len(shown) > 1 else ""
        charts.append(Chart(x, y, tuple(marks), title, run.style, 220 if len(shown) == 1 else 150))
        sentences.append(f"{run.style.label}: {len(times):,} decode-only steps{_explained(fit)}")
    more = len(sentences) - OVERLAID
    caption = "; ".join(sentences[:OVERLAID]) + (f"; and {more} more" if more > 0 else "")
    caption += ". Thick: the fit. Thin: the hardware's floor, where it is known."
    if thin:
        caption += f" Of more than {POINTS} steps: the fastest, a middle and the slowest of equal stretches."
    alt = "Decode step time against context tokens. " + caption
    return Figure(
        "decode", "where", "Decode step time", caption, alt, tuple(charts), columns=beside(len(charts))
    )


def _explained(fit: dict[str, float]) -> str:
    if fit.get("slope_s_per_token") is None:
        return ", no fit"
    squared = fit.get("r_squared")
    explained = "" if squared is None else f", R² of the fit {digits(squared, 2)}"
    if fit.get("per_sequence_s") is not None:
        explained += f", drawn at {digits(fit['median_sequences'])} sequences"
    return explained + (", by the device's events" if fit.get("timed_by") else "")
