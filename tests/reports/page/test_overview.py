"""The ranking, the front and the gates' history say what arms, records and gates say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from backbench.reports.arms import Arm, Run, measured
from backbench.reports.conclusion import judged_quantity
from backbench.reports.page.axes import linear
from backbench.reports.page.chart import Chart, Line, Point, Shade
from backbench.reports.page.html import load_page
from backbench.reports.page.overview import (
    MOST_DRAWN,
    Side,
    chosen,
    configuration_of,
    front_figures,
    gate_figure,
    load,
    ranked,
    ranking_figure,
)
from backbench.reports.page.rows import Rows
from backbench.reports.page.run_data import Page, RunData
from backbench.reports.quantities import quantity
from backbench.reports.record import RunDirectory, RunRecord

TPOT = quantity("metrics", "tpot_s", "p50")


@pytest.fixture(scope="module")
def page(gpu_runs: list[RunDirectory]) -> Page:
    return load_page([run.path for run in gpu_runs])


def points(chart: object) -> list[Point]:
    assert isinstance(chart, Chart)
    return [mark for mark in chart.marks if isinstance(mark, Point)]


def test_the_best_is_first_and_its_bar_has_the_records_number(page: Page) -> None:
    wanted = judged_quantity(page.arms)
    assert wanted == TPOT
    figure = ranking_figure(page.runs)
    assert figure is not None
    (rows,) = figure.charts
    assert isinstance(rows, Rows)
    values = sorted(measured(arm, TPOT).value or 0.0 for arm in page.arms)
    assert [row.value for row in rows.rows] == pytest.approx([1e3 * value for value in values])
    assert "Shorter is better" in figure.caption
    assert not any("better" in row.note or "worse" in row.note for row in rows.rows)


def with_value(record: RunRecord, seconds: float) -> RunRecord:
    p50 = {"value": seconds, "low": seconds, "high": seconds}
    return replace(record, metrics=record.metrics | {"tpot_s": record.metrics["tpot_s"] | {"p50": p50}})


def test_better_is_said_only_between_runs(page: Page, tmp_path_factory: pytest.TempPathFactory) -> None:
    record = page.runs[0].record
    experiment = tmp_path_factory.mktemp("x")
    arms = [
        Arm(name, tuple(Run(with_value(record, t * (1 + 0.01 * b)), b) for b in range(6)), experiment)
        for name, t in (("a", 1.0), ("b", 0.5), ("c", 1.0))
    ]
    runs = [replace(run, arm=arm) for run, arm in zip(page.runs, arms, strict=True)]
    figure = ranking_figure(runs)
    assert figure is not None
    assert isinstance(figure.charts[0], Rows)
    notes = [row.note for row in figure.charts[0].rows]
    assert "better" in notes[0]
    assert not any("better" in note or "worse" in note for note in notes[1:])


def test_too_many_runs_draw_the_best_and_the_reference(page: Page) -> None:
    run = page.runs[0]
    many = [replace(run, arm=Arm(str(n), (Run(with_value(run.record, 1.0 - n / 100)),))) for n in range(40)]
    kept = chosen(many, comparable=True)
    assert len(kept) == MOST_DRAWN
    assert [each.sample.label for each in kept] == ["0", *map(str, range(17, 40))]
    assert ranked(many)[0].sample.label == "39"
    assert chosen(many[:5], comparable=True) == many[:5]


def test_the_front_has_a_point_a_run(page: Page) -> None:
    figures = {figure.id: figure for figure in front_figures(page.runs)}
    assert list(figures) == ["front", "front-ttft", "front-watt"]
    chart = figures["front"].charts[0]
    assert isinstance(chart, Chart)
    assert chart.y.unit == "output tok/s/GPU"
    for run, point in zip(page.runs, points(chart), strict=True):
        metrics = run.record.metrics
        assert point.y == metrics["output_tokens_per_s_per_gpu"]["steady_state"]
        assert point.x == metrics["interactivity_tokens_per_s"]["p50"]
    assert "all at 6.00 req/s" in figures["front"].caption
    watts = points(figures["front-watt"].charts[0])
    assert [point.y for point in watts] == pytest.approx([1 / 0.21] * 3)
    ttft = points(figures["front-ttft"].charts[0])
    assert ttft[0].x == pytest.approx(1e3 * page.runs[0].record.metrics["ttft_s"]["p50"]["value"])
    assert isinstance(figures["front-ttft"].charts[0], Chart)
    assert figures["front-ttft"].charts[0].x.unit == "ms"


def changed(run: RunData, **metrics: object) -> RunData:
    record = replace(run.record, metrics=run.record.metrics | metrics)
    return replace(run, record=record, arm=None)


def test_a_stated_limit_is_a_shaded_region(page: Page) -> None:
    context = page.runs[0].record.metrics["context"]
    runs = [changed(run, context=context | {"slo_s": {"tpot": 0.0075}}) for run in page.runs]
    chart = front_figures(runs)[0].charts[0]
    assert isinstance(chart, Chart)
    (region,) = [mark for mark in chart.marks if isinstance(mark, Shade)]
    assert region.left == pytest.approx(1 / 0.0075)
    assert region.right == chart.x.high
    runs_of_ttft = [changed(run, context=context | {"slo_s": {"ttft": 0.014}}) for run in page.runs]
    chart = front_figures(runs_of_ttft)[1].charts[0]
    assert isinstance(chart, Chart)
    (region,) = [mark for mark in chart.marks if isinstance(mark, Shade)]
    assert (region.left, region.right) == (chart.x.low, pytest.approx(14))
    other = [changed(runs[0], context=context | {"slo_s": {"tpot": 0.1}}), *runs[1:]]
    chart = front_figures(other)[0].charts[0]
    assert isinstance(chart, Chart)
    assert not [mark for mark in chart.marks if isinstance(mark, Shade)]


def test_the_load_is_named(page: Page) -> None:
    record = page.runs[0].record
    closed = record.metrics["context"] | {"mode": "closed", "concurrency": 8}
    assert load(replace(record, metrics=record.metrics | {"context": closed})) == (8, "8 at once")
    assert load(record) == (6.0, "6.00 req/s")
    batch = record.metrics["context"] | {"mode": "all_at_once"}
    assert load(replace(record, metrics=record.metrics | {"context": batch})) == (120, "120 at once")


def test_one_configuration_under_several_loads_is_one_line(page: Page) -> None:
    context = page.runs[0].record.metrics["context"]
    runs = [
        changed(page.runs[0], context=context | {"mode": "closed", "concurrency": number})
        for number in (1, 4, 16)
    ]
    assert len({configuration_of(run.record) for run in runs}) == 1
    figure = front_figures(runs)[0]
    assert len(figure.legend) == 1
    assert isinstance(figure.charts[0], Chart)
    assert len([mark for mark in figure.charts[0].marks if isinstance(mark, Line)]) == 1
    assert [point.label for point in points(figure.charts[0])] == ["1 at once", "4 at once", "16 at once"]


def test_runs_under_one_load_are_not_joined(page: Page) -> None:
    chart = front_figures([page.runs[0], replace(page.runs[0], style=page.runs[1].style)])[0].charts[0]
    assert isinstance(chart, Chart)
    assert not [mark for mark in chart.marks if isinstance(mark, Line)]
    assert [point.style for point in points(chart)] == [page.runs[0].style, page.runs[1].style]


def test_without_power_there_is_no_front_per_watt(
    cpu_run: RunDirectory, make_run: Callable[..., RunDirectory]
) -> None:
    two = load_page([cpu_run.path, make_run("CPU", "sdpa", seed=5).path])
    assert [figure.id for figure in front_figures(two.runs)] == ["front", "front-ttft"]


def test_an_inverted_interval_keeps_its_order() -> None:
    side = Side("x (output tok/s/W)", TPOT, inverse=True)
    p50 = {"value": 0.5, "low": 0.4, "high": 0.6}
    found = side.read(
        Arm("a", (Run(RunRecord(run={"status": "complete"}, metrics={"tpot_s": {"p50": p50}})),))
    )
    assert found is not None
    assert found[0] == 2
    assert found[1] == pytest.approx((1 / 0.6, 2.5))


def test_gates_stand_in_their_order_with_their_margin(page: Page) -> None:
    row = {"utc": "2026-01-01", "gate": "nightly", "verdict": "pass", "metric": "tpot_p50"}
    rows = [
        row | {"loss": 0.01, "low": -0.01, "high": 0.03, "margin": 0.03, "detectable": 0.02},
        row | {"loss": 0.05, "low": 0.03, "high": 0.07, "margin": 0.03, "detectable": 0.02},
    ]
    figure = gate_figure(rows, page.runs[0].style)
    assert figure is not None
    (chart,) = figure.charts
    assert [point.y for point in points(chart)] == pytest.approx([1, 5])
    assert isinstance(chart, Chart)
    (margin,) = [mark for mark in chart.marks if isinstance(mark, Shade)]
    assert margin.top == pytest.approx(float(chart.y.place(3)))
    assert gate_figure([], page.runs[0].style) is None


def test_an_axis_of_one_gate_is_an_axis() -> None:
    assert len(linear("Gate (number)", [1, 1], ticks=1).ticks) >= 2
