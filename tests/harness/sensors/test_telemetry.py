"""The telemetry thread and its sensors."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from backbench.harness.sensors import rapl
from backbench.harness.sensors.cpu import HostSensor
from backbench.harness.sensors.present import open_sensors
from backbench.harness.sensors.process import SensorProcess
from backbench.harness.sensors.telemetry import Telemetry


class Counter:
    """A sensor that counts its samples and breaks at the `breaks_at`-th."""

    def __init__(self, breaks_at: int | None = None) -> None:
        self.samples = 0
        self.closed = 0
        self.breaks_at = breaks_at
        self.enough = threading.Event()

    def sample(self) -> list[dict[str, Any]]:
        self.samples += 1
        if self.samples == self.breaks_at:
            raise OSError("the bus\nis gone")
        if self.samples >= 3:
            self.enough.set()
        return [{"device": 0, "power_w": float(self.samples)}]

    def close(self) -> None:
        self.closed += 1


def test_samples_until_the_end() -> None:
    sensor = Counter()
    with Telemetry([sensor], period_s=0.001) as telemetry:
        assert sensor.enough.wait(5)
    count = sensor.samples
    assert len(telemetry.rows) == count >= 3
    assert sensor.closed == 1
    times = [row["time_ns"] for row in telemetry.rows]
    assert times == sorted(times)
    assert threading.active_count() == len([t for t in threading.enumerate() if t.name != "telemetry"])


def test_a_broken_sensor_ends_alone_and_is_named() -> None:
    broken, sound = Counter(breaks_at=2), Counter()
    with Telemetry([broken, sound], period_s=0.001) as telemetry:
        assert sound.enough.wait(5)
    assert telemetry.reasons == ["Counter stopped: the bus is gone"]
    assert (broken.closed, sound.closed) == (1, 1)


def test_nothing_to_sample_is_fine() -> None:
    with Telemetry([]) as telemetry:
        pass
    assert telemetry.rows == []


def test_the_host_has_memory() -> None:
    (row,) = HostSensor().sample()
    assert row["device"] == -1
    assert row["host_rss_bytes"] > 2**20


def test_a_row_with_a_time_of_its_own_keeps_it() -> None:
    class Stamped(Counter):
        def sample(self) -> list[dict[str, Any]]:
            return [row | {"time_ns": 7} for row in super().sample()]

    sensor = Stamped()
    with Telemetry([sensor], period_s=0.001) as telemetry:
        assert sensor.enough.wait(5)
    assert {row["time_ns"] for row in telemetry.rows} == {7}


def test_a_cpu_without_counters_has_the_host_and_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> list[Path]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(rapl, "packages", none)
    sensors, reasons = open_sensors("cpu")
    assert [type(sensor) for sensor in sensors] == [HostSensor]
    assert reasons == ["no accelerator, and the CPU's energy is not read: Permission denied"]


def test_a_cpu_with_counters_has_its_packages_energy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "energy_uj").write_text("5")
    (tmp_path / "max_energy_range_uj").write_text("1000")
    monkeypatch.setattr(rapl, "packages", lambda: [tmp_path])
    sensors, reasons = open_sensors("cpu")
    process = sensors[1]
    assert isinstance(process, SensorProcess) and process.sample()[-1]["energy_j"] == 0.0
    assert reasons == ["no accelerator; the energy is that of the CPU packages"]
    process.close()


def test_the_first_sample_is_there_before_what_is_measured_begins() -> None:
    class Asked(Counter):
        threads: list[int] = []  # noqa: RUF012 - one sensor

        def sample(self) -> list[dict[str, Any]]:
            self.threads.append(threading.get_ident())
            return super().sample()

    sensor = Asked()
    with Telemetry([sensor], period_s=0.001):
        assert sensor.threads[0] == threading.get_ident()
