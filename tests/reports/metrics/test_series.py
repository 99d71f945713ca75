"""What figures show follows from the tables, binned and thinned without losing its ends."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backbench.reports.metrics.latency import Samples
from backbench.reports.metrics.requests import Context
from backbench.reports.metrics.run import RunTables
from backbench.reports.metrics.series import (
    BINS,
    POINTS,
    bin_width,
    binned,
    decode_points,
    ecdf,
    panels,
    thinned_points,
    throughput,
)
from backbench.reports.record import RunDirectory


def tables_of(directory: RunDirectory) -> RunTables:
    context = Context.from_dict(directory.read_record().metrics["context"])
    return RunTables.read(
        directory.read_requests(), directory.read_steps(), context, directory.read_telemetry()
    )


@pytest.fixture(scope="module")
def run(gpu_runs: list[RunDirectory]) -> RunTables:
    return tables_of(gpu_runs[0])


def test_unknown_chunk_sizes_draw_no_throughput(run: RunTables) -> None:
    rows = replace(run.rows, chunk_tokens=[np.full(len(each), np.nan) for each in run.rows.chunk_tokens])
    assert throughput(RunTables(rows, rows, run.steps, run.context)) is None


def test_throughput_adds_up_to_the_tokens(run: RunTables) -> None:
    series = throughput(run)
    assert series is not None
    width = series.time_s[1] - series.time_s[0]
    # The last, shorter bin may be left out.
    assert series.values.sum() * width == pytest.approx(run.rows.output_tokens.sum(), rel=0.03)


def test_panels_of_a_cpu_run_have_no_gpu_sensors(cpu_run: RunDirectory) -> None:
    titles = [panel.title for panel in panels([tables_of(cpu_run)])]
    assert "Host CPU" in titles
    assert not {"Power", "SM clock", "Temperature"} & set(titles)


def test_warm_up_is_not_drawn(cpu_run: RunDirectory, tmp_path: Path) -> None:
    run = tables_of(cpu_run)
    steps = run.steps.copy()
    shift = int(steps["end_ns"].iloc[10])
    steps[["start_ns", "end_ns"]] -= shift
    moved = RunTables(run.rows, run.everyone, steps, run.context, run.telemetry)
    assert len(moved.measured_steps) == len(steps) - 11
    assert len(decode_points(moved)[0]) < len(decode_points(run)[0])


times = st.lists(st.floats(min_value=0, max_value=1e4), min_size=1, max_size=2000)


@given(times)
def test_ecdf_keeps_its_ends_and_stays_monotonic(values: list[float]) -> None:
    x, shares = ecdf(Samples(np.array(values)))
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


counts, seeds = st.integers(1, 3000), st.integers(0, 2**32 - 1)


@given(counts, seeds)
def test_binning_keeps_the_least_and_the_most(count: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    time_s, noise = np.sort(random.exponential(size=count)), random.normal(size=count)
    series = binned(time_s, noise)
    if series.least is None or series.most is None:
        assert len(series.values) == count <= BINS
        return
    assert (series.least.min(), series.most.max()) == (noise.min(), noise.max())
    assert (series.least <= series.values + 1e-12).all()
    assert (series.values <= series.most + 1e-12).all()


@given(counts, seeds)
def test_thinned_points_keep_the_extremes_of_every_stretch(count: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    x, y = random.integers(0, 500, count).astype(float), random.normal(size=count)
    keep = thinned_points(x, y)
    assert len(keep) <= POINTS
    assert len(set(keep.tolist())) == len(keep)
    assert (y[keep].min(), y[keep].max()) == (y.min(), y.max())


@given(st.floats(min_value=1e-3, max_value=1e6))
def test_bin_width_is_round_and_makes_few_bins(end: float) -> None:
    width = bin_width(end)
    assert end / width <= BINS * (1 + 1e-6)
    assert f"{width:.0e}"[0] in "125"
