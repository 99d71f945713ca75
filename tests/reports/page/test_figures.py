"""Figures show what the tables hold, with units, in a size that a page can carry."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backbench.reports.page.figures import POINTS, ecdf, ecdf_figure, itl_samples, ttft_samples
from backbench.reports.page.html import draw, load_runs
from backbench.reports.page.run_data import RunData
from backbench.reports.page.series import BINS, bin_width, binned, panels, throughput
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


def test_ttft_counts_from_the_intended_time(runs: list[RunData]) -> None:
    requests = runs[0].requests
    expected = (requests["first_ns"] - requests["intended_ns"]).astype(float) / 1e9
    np.testing.assert_allclose(ttft_samples(runs[0]).values_s, expected)


def test_failures_keep_the_curve_below_one(runs: list[RunData]) -> None:
    requests = runs[0].requests.copy()
    requests.loc[:29, "finished"] = False
    requests.loc[:29, "first_ns"] = pd.NA
    record = replace(runs[0].record, metrics={"counts": {"failed": 20, "never_sent": 10}})
    run = replace(runs[0], requests=requests, record=record)
    samples = ttft_samples(run)
    assert (len(samples.values_s), samples.total) == (90, 120)
    figure = ecdf_figure("ttft", "Time to first token", "TTFT", "requests", [run], [samples])
    assert figure is not None
    assert max(figure.data[0]["y"]) == 75
    assert "30 without a value" in figure.notes[0]


def test_itl_shares_a_gap_over_the_chunks_tokens(runs: list[RunData]) -> None:
    requests = pd.DataFrame(
        {
            "token_ns": [np.array([0, 4_000_000_000]), np.array([0, 1_000_000_000])],
            "token_counts": [np.array([1, 4]), np.array([1.0, np.nan])],
        }
    )
    samples = itl_samples(replace(runs[0], requests=requests))
    # One chunk of 4 tokens after 4 s: four gaps of 1 s, never zeros. The unknown count is left out.
    assert samples.values_s.tolist() == [1.0, 1.0, 1.0, 1.0]


def test_unknown_chunk_sizes_draw_no_throughput(runs: list[RunData]) -> None:
    requests = runs[0].requests.copy()
    requests["token_counts"] = [np.array([np.nan] * len(each)) for each in requests["token_ns"]]
    assert throughput(replace(runs[0], requests=requests)) is None


def test_throughput_adds_up_to_the_tokens(runs: list[RunData]) -> None:
    series = throughput(runs[0])
    assert series is not None
    width = series.time_s[1] - series.time_s[0]
    tokens = runs[0].record.metrics["output_tokens"]
    # The last, shorter bin may be left out.
    assert series.values.sum() * width == pytest.approx(tokens, rel=0.03)


def test_panels_of_a_cpu_run_have_no_gpu_sensors(cpu_run: RunDirectory) -> None:
    titles = [panel.title for panel in panels(load_runs([cpu_run]))]
    assert "Host CPU" in titles
    assert not {"Power", "SM clock", "Temperature"} & set(titles)


def test_warm_up_is_not_drawn(cpu_run: RunDirectory, tmp_path: object) -> None:
    run = load_runs([cpu_run])[0]
    steps = run.steps.copy()
    steps["end_ns"] -= int(steps["end_ns"].iloc[10])
    other = RunDirectory.create(f"{tmp_path}/run")
    other.write_record(cpu_run.read_record())
    other.write_requests(cpu_run.read_requests())
    other.write_steps(steps)
    other.write_telemetry(cpu_run.read_telemetry())
    assert len(load_runs([other])[0].steps) == len(steps) - 11


def test_a_run_without_any_data_draws_nothing(cpu_run: RunDirectory) -> None:
    run = load_runs([cpu_run])[0]
    empty = replace(
        run, requests=run.requests.iloc[:0], steps=run.steps.iloc[:0], telemetry=run.telemetry.iloc[:0]
    )
    assert draw([empty]) == {}


times = st.lists(st.floats(min_value=0, max_value=1e4), min_size=1, max_size=2000)


@given(times)
def test_ecdf_keeps_its_ends_and_stays_monotonic(values: list[float]) -> None:
    x, shares = ecdf(np.array(values), len(values))
    assert len(x) <= POINTS
    assert (x[0], x[-1]) == (min(values), max(values))
    assert shares[-1] == 1
    assert (np.diff(x) >= 0).all()
    assert (np.diff(shares) > 0).all()


@given(times)
def test_binning_keeps_the_range(values: list[float]) -> None:
    time_s = np.sort(np.array(values))
    series = binned(time_s, time_s)
    assert len(series.values) <= 2 * BINS
    assert series.values.min() >= time_s.min() - 1e-9
    assert series.values.max() <= time_s.max() + 1e-9


@given(st.floats(min_value=1e-3, max_value=1e6))
def test_bin_width_is_round_and_makes_few_bins(end: float) -> None:
    width = bin_width(end)
    assert end / width <= BINS * (1 + 1e-6)
    assert f"{width:.0e}"[0] in "125"
