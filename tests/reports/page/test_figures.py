"""Figures show what the tables hold, with units, in a size that a page can carry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from backbench.reports.metrics.latency import Samples
from backbench.reports.metrics.run import RunTables
from backbench.reports.page.chart import Band, Chart, Dots, Ghosts, Line, Mark, Shade
from backbench.reports.page.figure import Figure
from backbench.reports.page.figures import ecdf_figure
from backbench.reports.page.html import draw, load_page
from backbench.reports.page.run_data import Page
from backbench.reports.record import RunDirectory


@pytest.fixture(scope="module")
def three(gpu_runs: list[RunDirectory]) -> Page:
    return load_page([run.path for run in gpu_runs])


@pytest.fixture(scope="module")
def four(gpu_runs: list[RunDirectory], make_run: Callable[..., RunDirectory]) -> Page:
    return load_page([run.path for run in (*gpu_runs, make_run("AMD", "torch", seed=4))])


def drawn(page: Page) -> dict[str, Figure]:
    return {figure.id: figure for figure in draw(page)}


def marks(figure: Figure, kind: type) -> list[Mark]:
    charts = [chart for chart in figure.charts if isinstance(chart, Chart)]
    return [mark for chart in charts for mark in chart.marks if isinstance(mark, kind)]


def test_three_runs_share_a_chart_and_differ_without_colour(three: Page) -> None:
    figure = drawn(three)["ttft"]
    assert len(figure.charts) == 1
    lines = marks(figure, Line)
    for what in ("dash", "shape", "color"):
        assert len({getattr(line.style, what) for line in lines}) == 3  # type: ignore[attr-defined]


def test_four_runs_have_a_chart_each_with_all_behind_it(four: Page) -> None:
    found = drawn(four)
    assert "over-time" not in found
    for id in ("ttft", "itl", "time-0", "decode"):
        assert len(found[id].charts) == 4
    for id in ("ttft", "time-0"):
        assert len(marks(found[id], Ghosts)) == 4
        assert found[id].defs.count("<path") == 4


def test_every_axis_has_a_unit(three: Page, four: Page) -> None:
    for figure in (*draw(three), *draw(four)):
        for chart in figure.charts:
            if isinstance(chart, Chart):
                assert all(each.label.endswith(")") and each.unit for each in (chart.x, chart.y))


def test_failures_keep_the_curve_below_one(three: Page) -> None:
    samples = Samples(np.linspace(0.1, 0.9, 90), never=30)
    figure = ecdf_figure("ttft", "Time to first token", "TTFT", "requests", three.runs[:1], [samples])
    assert figure is not None
    (line,) = marks(figure, Line)
    assert max(line.y) == 75  # type: ignore[attr-defined]
    assert "30 without a value" in figure.caption


def test_the_steady_window_is_shaded_and_named(cpu_run: RunDirectory) -> None:
    page = load_page([cpu_run.path])
    figure = drawn(page)["over-time"]
    window = page.runs[0].tables.steady
    assert window is not None
    shades = marks(figure, Shade)
    assert len(shades) == len(figure.charts)
    for shade in shades:
        assert shade.left * 1e9 == pytest.approx(window.start_ns)  # type: ignore[attr-defined]
        assert shade.right * 1e9 == pytest.approx(window.end_ns)  # type: ignore[attr-defined]
    assert f"{window.end_ns / 1e9:.3g} s" in figure.caption


def test_what_binning_hides_is_a_band(cpu_run: RunDirectory) -> None:
    page = load_page([cpu_run.path])
    figure = drawn(page)["over-time"]
    steps = page.runs[0].tables.measured_steps
    bands = {
        chart.title: mark
        for chart in figure.charts
        for mark in chart.marks
        if isinstance(mark, Band)  # type: ignore[union-attr]
    }
    assert max(bands["Running requests"].high) == steps["running"].max()
    assert min(bands["Running requests"].low) == steps["running"].min()
    assert "from the least to the most" in figure.caption


def test_thinned_decode_steps_keep_the_slowest(cpu_run: RunDirectory) -> None:
    page = load_page([cpu_run.path])
    figure = drawn(page)["decode"]
    from backbench.reports.metrics.series import decode_points

    _, seconds = decode_points(page.runs[0].tables)
    (dots,) = marks(figure, Dots)
    assert max(dots.y) == pytest.approx(1e3 * seconds.max())  # type: ignore[attr-defined]
    assert min(dots.y) == pytest.approx(1e3 * seconds.min())  # type: ignore[attr-defined]
    assert "the fastest, a middle and the slowest" in figure.caption


def test_figures_draw_the_samples_of_the_tables(three: Page) -> None:
    """The figure's distribution is the one that the record's percentiles are of."""
    tables = three.runs[0].tables
    rows, context = tables.rows, tables.context
    unknown = replace(rows, chunk_tokens=[np.full(len(each), np.nan) for each in rows.chunk_tokens])
    changed = RunTables(unknown, unknown, tables.steps, context, tables.telemetry)
    run = replace(three.runs[0], read=lambda: changed)
    assert "itl" not in drawn(Page((run,), (run,)))


def test_a_run_without_any_data_draws_nothing(cpu_run: RunDirectory) -> None:
    run = load_page([cpu_run.path]).runs[0]
    empty = RunTables.read(
        cpu_run.read_requests().iloc[:0],
        run.tables.steps.iloc[:0],
        run.tables.context,
        cpu_run.read_telemetry().iloc[:0],
    )
    changed = replace(run, read=lambda: empty)
    assert drawn(Page((changed,), (changed,))) == {}


def test_the_numbers_of_a_figure_are_drawn_values(three: Page) -> None:
    figure = drawn(three)["ttft"]
    table = figure.numbers
    assert table is not None
    lines = {line.style.label: line for line in marks(figure, Line)}  # type: ignore[attr-defined]
    for row in table.rows:
        assert row[2].sort in lines[row[0].value].x  # type: ignore[attr-defined]
        assert row[4].sort in lines[row[0].value].y  # type: ignore[attr-defined]
