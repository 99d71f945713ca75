"""A machine that was not the run's own is told by the telemetry, with the figure; a quiet one is not."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from backbench.harness.frames import telemetry_frame
from backbench.reports.metrics import disturbance, validity
from backbench.reports.metrics.compute import sections
from backbench.reports.metrics.requests import Context
from backbench.reports.metrics.run import RunTables
from backbench.reports.record import REQUEST_COLUMNS, STEP_COLUMNS, RunRecord, typed

S = 10**9
COUNTERS = ("process_cpu_s", "machine_cpu_s", "steal_s", "cpu_pressure_s", "throttled_s")


def host(seconds: float = 4.0, cpus: int = 2, **a_second: float) -> list[dict[str, Any]]:
    """Samples of a host whose counters grow by so much a second from 1000 on; each 50 ms, from -1 s on."""
    return [
        {"time_ns": tick * S // 20, "device": -1, "usable_cpus": cpus}
        | {name: 1000 + rate * tick / 20 for name, rate in a_second.items()}
        for tick in range(-20, round(20 * seconds) + 3)
    ]


def card(clocks: list[float], processes: int = 1, utilization: float = 90.0) -> list[dict[str, Any]]:
    """Samples of a GPU, each 50 ms."""
    row = {"device": 0, "processes": processes, "utilization": utilization}
    return [row | {"time_ns": i * S // 20, "sm_clock_mhz": clock} for i, clock in enumerate(clocks)]


def figures(samples: list[dict[str, Any]], seconds: float = 4.0, gpus: int = 0) -> dict[str, Any]:
    context = Context("open", int(seconds * S), True, 8, gpus=gpus)  # no request: it was interrupted
    requests = pd.DataFrame(columns=list(REQUEST_COLUMNS)).astype({"warmup": bool, "finished": bool})
    steps = typed(pd.DataFrame(columns=list(STEP_COLUMNS)), STEP_COLUMNS)
    run = RunTables.read(requests, steps, context, telemetry_frame(samples, 0))
    found: dict[str, Any] = sections(run, ["metrics"], disturbance.METRICS)["metrics"]["disturbance"]
    return found


def test_a_quiet_machine_is_not_disturbed() -> None:
    busy = 0.9
    found = figures(host(process_cpu_s=busy, machine_cpu_s=busy + 0.04, steal_s=0.01, throttled_s=0.0))
    assert found["own_cpu_share"] == pytest.approx(0.45)
    assert found["others_cpu_share"] == pytest.approx(0.02)
    assert found["steal_share"] == pytest.approx(0.005)
    assert disturbance.reasons(found) == []


@pytest.mark.parametrize(
    ("rates", "words"),
    [
        ({"process_cpu_s": 1.0, "machine_cpu_s": 1.96}, "other processes took 48.0% of the 2 usable CPUs"),
        ({"process_cpu_s": 0.1, "machine_cpu_s": 0.5}, "other processes took 20.0% of the 2 usable CPUs"),
        ({"steal_s": 0.06}, "the hypervisor took 3.0% of the 2 usable CPUs (limit 2%)"),
        ({"throttled_s": 0.2}, "a CPU quota held back 10.0% of the 2 usable CPUs"),
    ],
)
def test_a_neighbour_a_hypervisor_and_a_quota_are_named(rates: dict[str, float], words: str) -> None:
    """The second: a run that uses a tenth of a CPU, beside load on CPUs it leaves idle."""
    (reason,) = disturbance.reasons(figures(host(**rates)))
    assert reason.startswith(words)


def test_what_was_used_before_and_after_the_run_does_not_count() -> None:
    rows = host(seconds=10, process_cpu_s=1.0, machine_cpu_s=1.0)
    for row in rows:
        time_s = row["time_ns"] / S
        row["machine_cpu_s"] += 0.9 * (min(time_s, 0) + max(time_s - 4, 0))
    assert figures(rows)["others_cpu_share"] == pytest.approx(0, abs=1e-9)
    assert figures(rows, seconds=8)["others_cpu_share"] == pytest.approx(0.9 / 2 / 2)


def test_waiting_and_switches_are_kept_and_not_judged() -> None:
    found = figures(host(cpu_pressure_s=0.99, involuntary_switches=1000))
    assert found["pressure_share"] == pytest.approx(0.99)
    assert found["involuntary_switches_per_s"] == pytest.approx(1000)
    assert disturbance.reasons(found) == []


def test_a_short_run_and_an_unknown_counter_have_a_reason_instead_of_a_figure() -> None:
    rows = host(process_cpu_s=1.0, machine_cpu_s=2.0)
    for found in (figures(rows, seconds=0.9), figures(host(process_cpu_s=1.0))):
        assert found["others_cpu_share"] is None
        assert disturbance.reasons(found) == []
    idle = figures(host(process_cpu_s=1.0, machine_cpu_s=0.0))  # a system that counts nothing
    assert idle["others_cpu_share"] is None


def test_the_two_clocks_apart_give_no_negative_share() -> None:
    assert figures(host(process_cpu_s=1.01, machine_cpu_s=1.0))["others_cpu_share"] == 0.0


def test_another_process_on_the_gpu_and_a_clock_that_fell_are_named() -> None:
    steady = [1980.0] * 80
    assert disturbance.reasons(figures(card(steady), gpus=1)) == []
    (other,) = disturbance.reasons(figures(card(steady, processes=3), gpus=1))
    assert other == "2 other processes used the GPU during the run"
    dip = [1980.0] * 72 + [1700.0] * 8
    (clock,) = disturbance.reasons(figures(card(dip), gpus=1))
    assert clock == "the GPU's clock was over 10% below its median for 10.0% of the time (limit 5%)"
    assert disturbance.reasons(figures(card(dip[:75]), gpus=1)) == []  # 3 of 75
    assert figures(card(dip))["low_clock_share"] is None  # on a CPU nobody asks the GPU


def test_an_idle_gpus_low_clock_does_not_count() -> None:
    rows = card([1980.0] * 60) + [
        row | {"time_ns": row["time_ns"] + 3 * S, "utilization": 0.0} for row in card([345.0] * 20)
    ]
    assert figures(rows, gpus=1)["low_clock_share"] == 0.0


def test_a_disturbance_is_a_reason_that_fails_no_command() -> None:
    reason = f"{validity.DISTURBED}other processes took 48.0% of the 2 usable CPUs (limit 10%)"
    run = {"status": "complete"}
    assert not validity.fails(RunRecord(run=run, validity=[reason, validity.INTERPRETED]))
    assert validity.fails(RunRecord(run=run, validity=[reason, "3 requests failed"]))
    assert validity.disturbed(RunRecord(run=run, validity=[reason])) == [reason.split(": ", 1)[1]]
