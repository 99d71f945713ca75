"""The sensor in a process of its own, on libraries that answer as a driver does, in the child alone."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from fake_nvml import NVML, put_before_others

from backbench.harness.sensors import process as module
from backbench.harness.sensors.cpu import HostSensor
from backbench.harness.sensors.present import open_sensors
from backbench.harness.sensors.process import SensorProcess
from backbench.harness.sensors.source import Source
from backbench.harness.sensors.telemetry import Telemetry

CARD = Source("nvidia", 0, ("GPU-1",))


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Put a module before all others, in children alone."""

    def put(name: str, text: str) -> None:
        put_before_others(name, text, tmp_path, monkeypatch)

    return put


@pytest.fixture
def card(library: Callable[[str, str], None]) -> Iterator[SensorProcess]:
    library("pynvml", NVML)
    found = SensorProcess(CARD)
    yield found
    found.close()


def test_a_sample_is_newer_than_the_question(card: SensorProcess) -> None:
    for _ in range(3):
        before_ns = time.perf_counter_ns()
        rows = card.sample()
        assert before_ns < rows[-1]["time_ns"] < time.perf_counter_ns(), "one clock in both processes"
    last = rows[-1]
    assert (last["device"], last["power_w"]) == (0, 100.0)
    assert last["energy_j"] > 0 and last["sampler_cpu_s"] > 0
    assert "power_w" not in card.missing and {"utilization", "temperature_c"} <= {*card.missing}


def test_it_samples_at_10_hz_though_nobody_asks(card: SensorProcess) -> None:
    card.sample()
    time.sleep(0.75)
    stamps = [row["time_ns"] for row in card.sample()]
    gaps_s = [(b - a) / 1e9 for a, b in itertools.pairwise(stamps)]
    assert len(stamps) >= 5 and sum(gaps_s) / len(gaps_s) < 0.15
    assert stamps == sorted(stamps)


def test_the_child_imports_sensors_alone(card: SensorProcess) -> None:
    """Nothing of torch, numpy or pandas is mapped into it, and it takes little of a CPU."""
    child = psutil.Process(card.pid)
    mapped = " ".join(each.path for each in child.memory_maps())
    assert not any(name in mapped for name in ("torch", "numpy", "pandas", "pyarrow"))
    before = sum(child.cpu_times()[:2])
    for _ in range(20):
        card.sample()
        time.sleep(0.05)
    assert sum(child.cpu_times()[:2]) - before < 0.2, "of a CPU second, in one second"


def test_a_killed_child_leaves_its_rows_and_is_named(card: SensorProcess) -> None:
    with Telemetry([HostSensor(), card], period_s=0.02) as telemetry:
        time.sleep(0.3)
        os.kill(card.pid, signal.SIGKILL)
        time.sleep(0.3)
    devices = [row["device"] for row in telemetry.rows]
    assert devices.count(0) >= 3, "the rows of before are kept"
    assert devices.count(-1) > devices.count(0), "and the other sensor went on"
    assert telemetry.reasons == ["SensorProcess stopped: the sensor process was ended by SIGKILL"]


def test_a_stuck_driver_does_not_hold_the_run_up(
    library: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ANSWERS_WITHIN_S", 0.3)
    stuck = NVML.replace("return 100_000", "time.sleep(60 * (time.perf_counter() - began > 0.5)); return 1")
    library("pynvml", stuck)
    begin_s = time.monotonic()
    with Telemetry([SensorProcess(CARD)], period_s=0.02) as telemetry:
        time.sleep(1.5)
    assert time.monotonic() - begin_s < 20
    assert telemetry.rows and "did not answer within 0.3 s" in telemetry.reasons[0]


@pytest.mark.parametrize("how", ["SIGKILL", "an exit"])
def test_it_ends_with_its_parent(library: Callable[[str, str], None], how: str) -> None:
    library("pynvml", NVML)
    ends = "os.kill(os.getpid(), 9)" if how == "SIGKILL" else "os._exit(0)"
    program = (
        "import os; from backbench.harness.sensors.process import SensorProcess as P;"
        "from backbench.harness.sensors.source import Source;"
        f"p = P(Source('nvidia', 0, ('GPU-1',))); print(p.pid, flush=True); {ends}"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    child = int(done.stdout)
    deadline = time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the child outlives its parent"
        time.sleep(0.02)


def test_closing_ends_it_once(card: SensorProcess) -> None:
    card.close()
    assert not psutil.pid_exists(card.pid)
    card.close()


@pytest.mark.parametrize(
    ("source", "why"),
    [
        (Source("nvidia", 0, ("GPU-2", "MIG-2")), "NVML does not answer: Not Found"),
        (Source("cpu", -1, ("/nowhere",)), "No such file"),
    ],
)
def test_what_is_not_there_is_said(library: Callable[[str, str], None], source: Source, why: str) -> None:
    library("pynvml", NVML)
    with pytest.raises(RuntimeError, match=why):
        SensorProcess(source)


def test_another_clock_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Info:
        implementation = "mach_absolute_time()"

    def info(name: str) -> Any:
        return Info()

    monkeypatch.setattr(time, "get_clock_info", info)
    with pytest.raises(RuntimeError, match="share no monotonic clock"):
        SensorProcess(CARD)


def test_a_hidden_nvml_is_a_reason_not_an_error(
    library: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    library("pynvml", "raise ImportError('No module named pynvml')")
    monkeypatch.setattr("backbench.harness.sensors.nvidia.names_of", lambda index: ("GPU-1",))
    sensors, reasons = open_sensors("nvidia")
    assert [type(each) for each in sensors] == [HostSensor]
    assert reasons == ["no GPU telemetry: No module named pynvml"]


def test_what_a_slice_does_not_offer_is_a_reason(
    library: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    library("pynvml", NVML.replace("return 100_000", "raise NVMLError('Not Supported')"))
    monkeypatch.setattr("backbench.harness.sensors.nvidia.names_of", lambda index: ("GPU-1",))
    sensors, reasons = open_sensors("nvidia")
    assert reasons[0].startswith("not offered by this driver or partition: power_w,")
    sensors[1].close()


def test_each_of_several_cards_has_a_process_and_a_reason_is_said_once(
    library: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    library("pynvml", NVML)
    monkeypatch.setattr("backbench.harness.sensors.nvidia.names_of", lambda index: ("GPU-1",))
    sensors, reasons = open_sensors("nvidia", 0, 1)
    assert [sensor.sample()[-1]["device"] for sensor in sensors[1:]] == [0, 1]
    assert len(reasons) == 1
    for each in sensors:
        each.close()
