"""A workload's profile as one HTML page without a script: its numbers, and charts as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from backbench.errors import printable
from backbench.harness.workload_profile import profile
from backbench.reports.page.axes import fitting, linear
from backbench.reports.page.chart import Chart, Line
from backbench.reports.page.figure import Figure, standalone
from backbench.reports.page.style import DASHES, SHADES, RunStyle
from backbench.workloads.request import Workload

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:820px;margin:2em auto;padding:0 1em;
color-scheme:light dark}table{border-collapse:collapse}td,th{padding:.2em 1em .2em 0;text-align:right}
td:first-child,th:first-child{text-align:left}svg{max-width:100%;height:auto}"""
SUMMARY = ("mean", "std", "minimum", "p50", "p90", "p99", "maximum")


def render_workload(workload: Workload, block_tokens: int) -> str:
    """The page as text."""
    found = profile(workload, block_tokens)
    figures = [_lengths(workload)]
    if found["arrivals"]:
        figures.append(_arrivals(found["arrivals"]))
    drawn = "".join(standalone(figure, figure.legend) for figure in figures)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{_text(found["name"])}</title>'
        f"<style>{STYLE}</style><h1>{_text(found['name'])}</h1>{_table(found)}{_facts(found)}{drawn}</html>\n"
    )


def _styles(*labels: str) -> list[RunStyle]:
    return [
        RunStyle(label, f"--run-{place}", *SHADES["cpu"][place], DASHES[place], place)
        for place, label in enumerate(labels)
    ]


def _lengths(workload: Workload) -> Figure:
    styles = _styles("prompts", "outputs")
    lengths = (
        np.sort([len(request.prompt) for request in workload.requests]).astype(float),
        np.sort([request.output_tokens for request in workload.requests]).astype(float),
    )
    x, y = (
        fitting("Length (tokens)", np.concatenate(lengths)),
        linear("Requests at most so long (%)", [0, 100]),
    )
    lines = tuple(
        Line(values, 100 * np.arange(1, len(values) + 1) / len(values), style, steps=True)
        for values, style in zip(lengths, styles, strict=True)
    )
    alt = "The share of requests whose prompt, and whose output, is at most so long."
    return Figure("lengths", "", "Lengths", alt, alt, (Chart(x, y, lines),), tuple(styles))


def _arrivals(arrivals: dict[str, Any]) -> Figure:
    styles = _styles("arrivals")
    width, counts = arrivals["bin_s"], arrivals["counts"]
    starts, rates = width * np.arange(len(counts)), np.array(counts) / width
    chart = Chart(
        linear("Time (s)", [0, width * len(counts)]),
        linear("Arrivals (requests/s)", rates),
        (Line(starts, rates, styles[0], steps=True),),
    )
    alt = f"Requests per second over time, in {len(counts)} equal parts."
    return Figure("arrivals", "", "Arrivals", alt, alt, (chart,), tuple(styles))


def _table(found: dict[str, Any]) -> str:
    rows: list[tuple[str, dict[str, Any] | None]] = [
        ("Prompt tokens", found["prompt_tokens"]),
        ("Output tokens", found["output_tokens"]),
    ]
    for part in found["parts"] or ():
        rows.append((f"{part['name']}: prompt tokens", part["prompt_tokens"]))
        rows.append((f"{part['name']}: output tokens", part["output_tokens"]))
    head = "".join(f"<th>{name}</th>" for name in ("", *SUMMARY))
    body = "".join(_row(name, summary) for name, summary in rows if summary is not None)
    return f"<table><tr>{head}</tr>{body}</table>"


def _row(name: str, summary: dict[str, Any]) -> str:
    cells = "".join(f"<td>{summary[key]:,.0f}</td>" for key in SUMMARY)
    return f"<tr><td>{_text(name)}</td>{cells}</tr>"


def _facts(found: dict[str, Any]) -> str:
    arrivals, sessions, clipped = found["arrivals"], found["sessions"], found["clipped"]
    facts = [
        f"{found['requests']:,} requests",
        f"ideal prefix hits {found['prefix']['ideal_hit_ratio']:.1%} of prompt tokens, in blocks of "
        f"{found['prefix']['block_tokens']}",
    ]
    if arrivals:
        names = {
            "requests_per_s": "requests/s",
            "gap_cv": "gaps' CV",
            "index_of_dispersion": "index of dispersion",
        }
        facts += [f"{name} {arrivals[key]:.3g}" for key, name in names.items() if arrivals[key] is not None]
        facts.append(f"the last request is due after {found['schedule_s']:,.0f} s")
    else:
        facts.append(found["untimed"])
    if sessions:
        facts.append(f"{sessions['sessions']:,} sessions of {sessions['turns']['mean']:.3g} turns on average")
    if clipped:
        facts.append(f"{clipped['requests']:,} requests clipped to {clipped['max_len']:,} tokens")
    return _list([*facts, *found["notes"], f"content hash {found['content_hash']}"])


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{_text(line)}</li>" for line in lines) + "</ul>"


def _text(text: str) -> str:
    return escape(printable(text))
