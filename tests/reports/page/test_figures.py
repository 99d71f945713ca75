"""Figures show what the tables hold, with units, in a size that a page can carry."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from backbench.reports.metrics.latency import Samples
from backbench.reports.metrics.run import RunTables
from backbench.reports.page.figures import ecdf_figure
from backbench.reports.page.html import draw, load_runs
from backbench.reports.page.run_data import RunData
from backbench.reports.record import RunDirectory


@pytest.fixture(scope="module")
def runs(gpu_runs: list[RunDirectory]) -> list[RunData]:
    return load_runs(gpu_runs)


def test_plotly_accepts_every_figure(runs: list[RunData]) -> None:
    import plotly.graph_objects as go

    drawn = draw(runs)
    assert list(drawn) == ["ttft", "itl", "over-time", "decode"]
    for figure in drawn.values():
        # Colours are CSS variables until the page resolves them.
        text = json.dumps([figure.data, figure.layout]).replace("var(--font)", "serif")
        data, layout = json.loads(_resolve(text))
        go.Figure(data=data, layout=layout)


def _resolve(text: str) -> str:
    import re

    return re.sub(r"var\(--[\w-]+\)", "#123456", text)


def test_every_axis_has_a_unit(runs: list[RunData]) -> None:
    for figure in draw(runs).values():
        axes = {key: value for key, value in figure.layout.items() if key[1:5] == "axis"}
        titled = [value["title"]["text"] for value in axes.values() if value["title"]["text"]]
        titled += [each["text"] for each in figure.layout.get("annotations", [])]
        assert len(titled) >= 2
        assert all("(" in text and text.endswith(")") for text in titled)


def test_runs_differ_in_dash_and_marker_not_only_in_colour(runs: list[RunData]) -> None:
    lines = draw(runs)["ttft"].data
    assert len({each["line"]["dash"] for each in lines}) == 3
    assert len({each["marker"]["symbol"] for each in lines}) == 3
    assert len({each["line"]["color"] for each in lines}) == 3


def test_failures_keep_the_curve_below_one(runs: list[RunData]) -> None:
    samples = Samples(np.linspace(0.1, 0.9, 90), never=30)
    figure = ecdf_figure("ttft", "Time to first token", "TTFT", "requests", runs[:1], [samples])
    assert figure is not None
    assert max(figure.data[0]["y"]) == 75
    assert "30 without a value" in figure.notes[0]


def test_figures_draw_the_samples_of_the_tables(runs: list[RunData]) -> None:
    """The figure's distribution is the one that the record's percentiles are of."""
    tables = runs[0].tables
    rows, context = tables.rows, tables.context
    unknown = replace(rows, chunk_tokens=[np.full(len(each), np.nan) for each in rows.chunk_tokens])
    run = replace(runs[0], tables=RunTables(unknown, unknown, tables.steps, context, tables.telemetry))
    assert "itl" not in draw([run])


def test_a_run_without_any_data_draws_nothing(cpu_run: RunDirectory) -> None:
    run = load_runs([cpu_run])[0]
    requests = cpu_run.read_requests().iloc[:0]
    tables = RunTables.read(
        requests, run.tables.steps.iloc[:0], run.tables.context, cpu_run.read_telemetry().iloc[:0]
    )
    assert draw([replace(run, tables=tables)]) == {}
