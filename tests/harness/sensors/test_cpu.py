"""What the host sensor reads: this process's time with its threads, everyone's, and what held it back."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import psutil
import pytest

from backbench.harness.sensors.cpu import (
    HostSensor,
    machine_cpu_s,
    pressure_s,
    quota_file,
    throttled_s,
    usable_cpus,
)
from backbench.reports.record import TELEMETRY_COLUMNS


def test_columns_are_the_records_and_counters_grow() -> None:
    sensor = HostSensor()
    (first,) = sensor.sample()
    assert {*first} <= {*TELEMETRY_COLUMNS}

    def work() -> None:
        end = time.thread_time() + 0.05
        while time.thread_time() < end:
            pass

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    (second,) = sensor.sample()
    assert second["process_cpu_s"] - first["process_cpu_s"] >= 0.05  # another thread's time
    assert all(second[name] >= first[name] for name in first if name.endswith("_s"))
    assert first["usable_cpus"] == len(usable_cpus()) >= 1


def test_only_the_usable_cpus_count(monkeypatch: pytest.MonkeyPatch) -> None:
    class Times:
        def __init__(self, user: float) -> None:
            self.user, self.system, self.idle, self.iowait, self.steal = user, 1.0, 50.0, 7.0, user / 10

    def cpu_times(percpu: bool = False) -> object:
        return [Times(10.0), Times(20.0), Times(40.0)] if percpu else Times(70.0)

    monkeypatch.setattr(psutil, "cpu_count", lambda: 3)
    monkeypatch.setattr(psutil, "cpu_times", cpu_times)
    assert machine_cpu_s([0, 2]) == (52.0, 5.0)
    assert machine_cpu_s([0, 1, 2]) == (71.0, 7.0)


def test_pressure_is_what_some_task_waited() -> None:
    text = "some avg10=99.43 avg60=99.62 total=2762452383\nfull avg10=0.00 total=5\n"
    assert pressure_s(text) == pytest.approx(2762.452383)


@pytest.mark.parametrize(
    ("membership", "place", "text", "seconds"),
    [
        ("0::/ours", "ours", "usage_usec 5\nthrottled_usec 2500000", 2.5),
        ("3:cpuset:/\n1:cpu,cpuacct:/ours\n0::/", "cpu,cpuacct/ours", "throttled_time 1500000000", 1.5),
        ("0::/", "", "usage_usec 5", None),
    ],
)
def test_a_quotas_counter_is_found_in_either_version(
    tmp_path: Path, membership: str, place: str, text: str, seconds: float | None
) -> None:
    (tmp_path / "cgroup").write_text(membership)
    folder = tmp_path / "groups" / place
    folder.mkdir(parents=True)
    (folder / "cpu.stat").write_text(text)
    file = quota_file(tmp_path / "cgroup", tmp_path / "groups")
    assert (None if file is None else throttled_s(file)) == seconds


def test_a_system_without_control_groups_has_no_quota(tmp_path: Path) -> None:
    assert quota_file(tmp_path / "nowhere") is None
