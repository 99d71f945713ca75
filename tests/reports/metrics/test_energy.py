"""The energy rule: the counter where it can be trusted, else the trapezoid of sampled power."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from backbench.harness.frames import telemetry_frame
from backbench.reports.metrics import energy
from backbench.reports.metrics.window import Window

S = 10**9


def samples(
    seconds: float, counter_factor: float | None = 1.0, device: int = 0, period_s: float = 0.1
) -> Any:
    """Power ramps from 100 W by 10 W a second; the counter is its integral times `counter_factor`."""
    times = np.arange(-1, seconds + 1, period_s)
    rows = []
    for t in times:
        joules = 100 * t + 5 * t * t
        rows.append(
            {
                "time_ns": round(t * S),
                "device": device,
                "power_w": 100 + 10 * t,
                "energy_j": None if counter_factor is None else counter_factor * joules,
            }
        )
    return rows


def section(
    rows: Any, seconds: float, tokens: float | None = 1000.0, reasons: list[str] | None = None
) -> Any:
    window = Window(0, seconds * S)
    counts = {"whole_run": tokens, "steady_state": tokens}
    return energy.section(telemetry_frame(rows, 0), window, window, counts, reasons or [], 75.0)


def test_a_counter_that_agrees_is_used() -> None:
    found = section(samples(20, 1.04), 20)
    best = found["measured"]["steady_state"]
    assert best["source"] == ["hardware counter"]
    assert best["energy_j"] == pytest.approx(1.04 * 4000)
    assert found["joules_per_output_token"] == pytest.approx(1.04 * 4.0)
    assert found["stretch"] == "steady_state"
    assert best["sampling_period_s"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("seconds", "factor", "reason"),
    [(20, 1.06, "differ by more than 5%"), (9, 1.0, "shorter than 10 s"), (20, None, "no energy counter")],
)
def test_otherwise_the_trapezoid(seconds: int, factor: float | None, reason: str) -> None:
    found = section(samples(seconds, factor), seconds)["measured"]["steady_state"]
    assert found["source"] == ["trapezoid of sampled power"]
    assert found["energy_j"] == pytest.approx(100 * seconds + 5 * seconds**2)
    assert reason in found["reasons"][0]


def test_idle_power_is_reported_and_not_subtracted() -> None:
    found = section(samples(20), 20)
    assert found["idle_power_w"] == 75.0
    assert found["measured"]["whole_run"]["mean_power_w"] == pytest.approx(200)


def test_devices_add_up() -> None:
    found = section(samples(20) + samples(20, device=1), 20)
    assert found["measured"]["whole_run"]["energy_j"] == pytest.approx(8000)


def test_absent_is_null_with_a_reason() -> None:
    found = section([{"time_ns": 0, "device": -1}], 20, reasons=["no accelerator"])
    assert found["joules_per_output_token"] is None
    assert found["reasons"] == ["no accelerator"]


def test_samples_that_do_not_cover_the_stretch_give_nothing() -> None:
    assert section(samples(5), 20)["joules_per_output_token"] is None


def test_no_tokens_no_quotient() -> None:
    found = section(samples(20), 20, tokens=None)
    assert found["joules_per_output_token"] is None
    assert "no output tokens" in found["reasons"][0]


def test_the_edges_are_interpolated() -> None:
    times = np.array([0.0, 1.0, 2.0]) * S
    watts = np.array([0.0, 10.0, 20.0])
    assert energy.integrate(times, watts, Window(0.5 * S, 1.5 * S)) == pytest.approx(10.0)


def test_the_largest_gap_is_reported() -> None:
    rows = [row for row in samples(20) if not 5 * S < row["time_ns"] < 8 * S]
    assert section(rows, 20)["measured"]["whole_run"]["largest_gap_s"] == pytest.approx(3.0, abs=0.2)


def test_frame_of_nothing() -> None:
    frame: pd.DataFrame = telemetry_frame([], 0)
    assert frame.empty


def test_a_counter_without_a_power_reading_is_used_and_named() -> None:
    """A CPU's packages count joules and say no watts; the host's own rows stand between theirs."""
    counted = [{**row, "device": -1, "power_w": None} for row in samples(20)]
    host = [{"time_ns": row["time_ns"] + 7, "device": -1, "host_rss_bytes": 5} for row in counted]
    frame = telemetry_frame(sorted(counted + host, key=lambda row: row["time_ns"]), 0)
    window = Window(0, 20 * S)
    counts: dict[str, float | None] = {"whole_run": 1000.0, "steady_state": 1000.0}
    found = energy.section(frame, window, window, counts, [], None, energy.SCOPES["cpu"])
    best = found["measured"]["whole_run"]
    assert (best["source"], best["counter_over_power"]) == (["hardware counter"], [None])
    assert best["reasons"] == ["no power reading to hold the counter against"]
    assert best["energy_j"] == pytest.approx(4000)
    assert (found["joules_per_output_token"], found["scope"]) == (pytest.approx(4.0), "CPU packages")
    assert found["idle_power_w"] is None and "idle_power_w" in found["absent"]


def test_the_samplers_own_cost_is_beside_it() -> None:
    rows = [row | {"sampler_cpu_s": 3.0 + row["time_ns"] / S * 0.02} for row in samples(20)]
    assert section(rows, 20)["sampler_cpu_share"] == pytest.approx(0.02)
    assert "sampler_cpu_share" not in section(samples(20), 20)


def test_samples_that_end_in_mid_run_give_nothing_and_the_reason() -> None:
    rows = [row for row in samples(20) if row["time_ns"] < 9 * S]
    found = section(rows, 20, reasons=["SensorProcess stopped: the sensor process was ended by SIGKILL"])
    assert found["joules_per_output_token"] is None
    assert found["absent"]["joules_per_output_token"].endswith("SIGKILL")
