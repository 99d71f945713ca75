"""The report's figures as plotly.js JSON: plain dicts, rounded and thinned, colours as CSS variables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from backbench.reports.metrics import decode_fit
from backbench.reports.metrics.latency import Samples
from backbench.reports.metrics.series import Panel, decode_points, ecdf, thinned
from backbench.reports.page.run_data import RunData
from backbench.reports.page.style import RunStyle
from backbench.reports.quantities import digits, format_value


@dataclass(frozen=True)
class Figure:
    """A plot, and the words for who cannot see it."""

    id: str
    title: str
    caption: str
    alt: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    height: int = 340
    wide: bool = False
    """Takes the whole width of the page."""
    notes: list[str] = field(default_factory=list)


def rounded(values: Any, count: int = 5) -> list[float | None]:
    """`count` significant digits, NaN as None: a plot shows no more, and the page stays small."""
    numbers = np.asarray(values, dtype=float)
    return [float(f"{each:.{count}g}") if np.isfinite(each) else None for each in numbers]


def axis(title: str, **more: Any) -> dict[str, Any]:
    """An axis in the report's style; `title` always has the unit."""
    common = {
        "title": {"text": title, "font": {"size": 12}, "standoff": 8},
        "gridcolor": "var(--grid)",
        "linecolor": "var(--line)",
        "zeroline": False,
        "automargin": True,
        "tickfont": {"size": 11},
        "ticks": "",
    }
    return common | more


def layout(**more: Any) -> dict[str, Any]:
    """The layout every figure shares: transparent, no drag (a phone must be able to scroll past it)."""
    common = {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "var(--font)", "color": "var(--muted)", "size": 12},
        "margin": {"l": 8, "r": 12, "t": 12, "b": 8},
        "dragmode": False,
        "hovermode": "closest",
        "hoverlabel": {
            "bgcolor": "var(--card)",
            "bordercolor": "var(--line)",
            "font": {"color": "var(--text)"},
        },
        "showlegend": False,
    }
    return common | more


def line(style: RunStyle, x: Sequence[Any], y: Sequence[Any], hover: str, **more: Any) -> dict[str, Any]:
    """One run's line: its colour, its dash, and (where there are several runs) a few of its markers."""
    return {
        "type": "scatter",
        "mode": "lines+markers" if style.marked else "lines",
        "name": style.label,
        "x": list(x),
        "y": list(y),
        "line": {"color": style.color, "dash": style.dash, "width": 2},
        "marker": {"symbol": style.symbol, "size": 7, "color": style.color, "maxdisplayed": 9},
        "hovertemplate": hover + "<extra></extra>",
    } | more


def ecdf_figure(
    id: str, title: str, short: str, unit_name: str, runs: Sequence[RunData], samples: list[Samples]
) -> Figure | None:
    """The share of all samples at or below each latency; failures keep the curve below 100 %."""
    shown = [(run, each) for run, each in zip(runs, samples, strict=True) if len(each.values_s)]
    if not shown:
        return None
    factor, unit = time_axis(np.concatenate([each.values_s for _, each in shown]))
    traces, sentences = [], []
    for run, each in shown:
        values, shares = ecdf(each)
        hover = f"{run.style.hover_label}<br>%{{y:.1f}} % at or below %{{x:,.4~g}} {unit}"
        traces.append(
            line(run.style, rounded(values / factor), rounded(100 * shares), hover)
            | {"line": {"color": run.style.color, "dash": run.style.dash, "width": 2, "shape": "hv"}}
        )
        middle = np.quantile(each.values_s, 0.5)
        sentences.append(
            f"{run.style.label}: half of {each.total:,} {unit_name} at or below {format_value(middle, 's')}"
        )
    everything = np.concatenate([each.values_s for _, each in shown])
    low, high = np.quantile(everything, [0.005, 1.0])
    logarithmic = bool(low > 0 and high / low > 20)
    words = f"{short} ({unit}{', log scale' if logarithmic else ''})"
    x = axis(words, type="log", dtick="D2") if logarithmic else axis(words, rangemode="tozero")
    y = axis("Share of samples (%)", range=[0, 102], tickvals=[0, 25, 50, 75, 90, 100])
    missing = sum(each.total - len(each.values_s) for _, each in shown)
    notes = [f"{missing:,} without a value count as infinite."] if missing else []
    alt = f"Cumulative distribution of {title.lower()}. " + "; ".join(sentences) + "."
    caption = "; ".join(sentences) + "."
    return Figure(id, title, caption, alt, traces, layout(xaxis=x, yaxis=y), notes=notes)


def time_axis(values_s: np.ndarray) -> tuple[float, str]:
    """The factor and unit in which most of `values_s` read well."""
    middle = float(np.quantile(values_s, 0.5)) if len(values_s) else 1.0
    return (1.0, "s") if middle >= 1 else (1e-3, "ms") if middle >= 1e-3 else (1e-6, "µs")


def over_time_figure(runs: Sequence[RunData], panels: Sequence[Panel]) -> Figure | None:
    """One panel a quantity, stacked on a shared time axis."""
    if not panels:
        return None
    gap = 0.22 / len(panels)
    height = (1 - gap * (len(panels) - 1)) / len(panels)
    figure_layout = layout(hovermode="x unified", margin={"l": 8, "r": 12, "t": 26, "b": 8})
    traces, annotations, sentences = [], [], []
    for place, panel in enumerate(panels):
        suffix = "" if place == 0 else str(place + 1)
        top = 1 - place * (height + gap)
        bottom = max(top - height, 0.0)
        last = place == len(panels) - 1
        y_axis = axis("", domain=[round(bottom, 4), round(top, 4)], rangemode="tozero", nticks=4)
        figure_layout[f"yaxis{suffix}"] = y_axis
        x_axis = axis("Time since the run's start (s)" if last else "", anchor=f"y{suffix}", showgrid=False)
        x_axis |= {} if place == 0 else {"matches": "x"}
        figure_layout[f"xaxis{suffix}"] = x_axis | ({} if last else {"showticklabels": False})
        annotations.append(
            {
                "text": f"<b>{panel.title}</b> ({panel.unit})",
                "xref": "paper",
                "yref": "paper",
                "x": 0,
                "y": top,
                "xanchor": "left",
                "yanchor": "bottom",
                "showarrow": False,
                "font": {"size": 12, "color": "var(--text)"},
            }
        )
        for run, series in zip(runs, panel.series, strict=True):
            if series is None:
                continue
            hover = f"{run.style.hover_label}: %{{y:,.4~g}} {panel.unit}"
            on_axes = {"xaxis": f"x{suffix}", "yaxis": f"y{suffix}"}
            traces.append(line(run.style, rounded(series.time_s), rounded(series.values), hover, **on_axes))
            peak = digits(float(np.nanmax(series.values)))
            sentences.append(f"{panel.title}, {run.style.label}: at most {peak} {panel.unit}")
    figure_layout["annotations"] = annotations
    names = "; ".join(panel.title for panel in panels)
    alt = "Over time. " + "; ".join(sentences) + "."
    caption = f"On one time axis: {names}."
    tall = 60 + 150 * len(panels)
    return Figure("over-time", "Over time", caption, alt, traces, figure_layout, tall, wide=True)


def decode_figure(runs: Sequence[RunData]) -> Figure | None:
    """Step time against context tokens for steps that only decode, with the fit and its floor."""
    traces: list[dict[str, Any]] = []
    sentences = []
    for run in runs:
        context, seconds = decode_points(run.tables)
        if not len(seconds):
            continue
        keep = thinned(len(seconds))
        hover = f"{run.style.hover_label}<br>%{{x:,}} context tokens<br>%{{y:.4~g}} ms<extra></extra>"
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": run.style.label,
                "hovertemplate": hover,
                "x": rounded(context[keep], 7),
                "y": rounded(1e3 * seconds[keep], 4),
                "marker": {"symbol": run.style.symbol, "size": 5, "color": run.style.color, "opacity": 0.35},
            }
        )
        ends = np.array([0.0, context.max()])
        fit = run.record.roofline.get("decode_fit") or {}
        for name, width in (("fit", 2.5), ("floor", 1)):
            found = decode_fit.line(fit, ends, floor=name == "floor")
            if found is None:
                continue
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "x": rounded(ends, 7),
                    "y": rounded(1e3 * found),
                    "name": f"{run.style.label}, {name}",
                    "line": {
                        "color": run.style.color,
                        "dash": run.style.dash,
                        "width": width,
                    },
                    "hovertemplate": f"{run.style.hover_label}, {name}: %{{y:.4~g}} ms<extra></extra>",
                }
            )
        squared = fit.get("r_squared")
        explained = "" if squared is None else f", R² of the fit {digits(squared, 2)}"
        if fit.get("slope_s_per_token") is None:
            explained = ", no fit"
        elif fit.get("per_sequence_s") is not None:
            explained += f", drawn at {digits(fit['median_sequences'])} sequences"
        sentences.append(f"{run.style.label}: {len(seconds):,} decode-only steps{explained}")
    if not traces:
        return None
    x = axis("Context tokens in the step (tokens)", rangemode="tozero")
    y = axis("Step time (ms)", rangemode="tozero")
    caption = "; ".join(sentences) + ". Thick: the fit. Thin: the hardware's floor, where it is known."
    alt = "Decode step time against context tokens. " + caption
    title = "Decode step time"
    return Figure("decode", title, caption, alt, traces, layout(xaxis=x, yaxis=y), 360, wide=True)
