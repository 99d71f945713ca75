"""What ends or hinders a run from outside: a full disk, a stalled target, a killed telemetry process."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from fake_nvml import NVML, put_before_others

from backbench.errors import HarnessError, ReportError
from backbench.harness import experiment, recording
from backbench.harness.experiment import Observer
from backbench.harness.options import RunOptions
from backbench.harness.run_log import LOG_FILE, RunLog
from backbench.harness.sensors.cpu import HostSensor
from backbench.harness.sensors.process import SensorProcess
from backbench.harness.sensors.source import Source
from backbench.harness.sensors.telemetry import Sensor
from backbench.harness.subjects.scripted import ScriptedSubject, ScriptedTarget
from backbench.harness.subjects.target import TokenEvent
from backbench.reports.record import RECORD_FILE, RunDirectory
from backbench.reports.verify import verify
from backbench.workloads.request import Request

SCRIPTED = RunOptions(
    workload="synthetic",
    backend="scripted",
    load={"input_lengths": "fixed:8", "output_lengths": "fixed:5", "num_requests": 12, "concurrency": 3},
    warmup=0,
)


def run(options: RunOptions, subject: Any = None) -> experiment.Outcome:
    return experiment.run(options, Observer(), lambda options: subject or ScriptedSubject())


def no_room(monkeypatch: pytest.MonkeyPatch, name: str, after: int = 0) -> None:
    """A disk on which the file of this name finds no room, once it was written `after` times."""
    found, written = RunDirectory._replace, [0]

    def replace_(self: RunDirectory, file: str, write: Callable[[Path], object]) -> None:
        def half(temporary: Path) -> None:
            temporary.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        written[0] += file == name
        found(self, file, half if file == name and written[0] > after else write)

    monkeypatch.setattr(RunDirectory, "_replace", replace_)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_disk_that_fills_up_under_the_log_costs_the_log_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = RunLog.claim

    def full(path: Path) -> RunLog:
        log = claim(path)
        log._file.close()
        log._file = Path("/dev/full").open("w", encoding="utf-8")  # noqa: SIM115 - the log's own to close
        return log

    monkeypatch.setattr(RunLog, "claim", full)
    outcome = run(replace(SCRIPTED, out=tmp_path / "run"))
    record = outcome.directory.read_record()
    assert record.run["status"] == "complete"
    assert "No space left on device" in record.run["log"]
    assert record.metrics["counts"]["completed"] == 12 and verify(outcome.directory) == []
    assert not (tmp_path / "run" / LOG_FILE).exists()


@pytest.mark.parametrize("name", ["requests.parquet", "telemetry.parquet", RECORD_FILE])
def test_a_disk_that_fills_up_under_the_record_leaves_what_recover_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with monkeypatch.context() as full:
        no_room(full, name)
        with pytest.raises(ReportError, match=f"{name}: No space left on device"):
            run(replace(SCRIPTED, out=tmp_path / "run"))
    assert not (tmp_path / "run" / RECORD_FILE).exists()
    assert not list((tmp_path / "run").glob(".*.tmp")), "no half file is left"
    record = recording.recover(tmp_path / "run")
    assert record.metrics["counts"]["completed"] == 12
    assert verify(RunDirectory.open(tmp_path / "run")) == []


def test_a_disk_that_fills_up_after_the_check_leaves_the_record_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_room(monkeypatch, RECORD_FILE, after=1)
    with pytest.raises(ReportError, match="No space left on device"):
        run(replace(SCRIPTED, out=tmp_path / "run"))
    directory = RunDirectory.open(tmp_path / "run")
    assert directory.read_record().correctness["reason"] == "the run ended before the check"
    assert verify(directory) == []


def test_a_target_that_raises_loses_no_finished_request(tmp_path: Path) -> None:
    class Breaks(ScriptedTarget):
        def poll(self, deadline_ns: int | None) -> list[TokenEvent]:
            if self.clock.now_ns > 5_200_000_000:
                raise ValueError("the device\nfell off the bus")
            return super().poll(deadline_ns)

    class Subject(ScriptedSubject):
        def start(self) -> ScriptedTarget:
            return Breaks(self.clock, self.chunks, self.slots)

    outcome = run(replace(SCRIPTED, out=tmp_path / "run"), Subject())
    assert isinstance(outcome.failure, ValueError)
    record = outcome.directory.read_record()
    counts = record.metrics["counts"]
    assert record.run["status"] == "failed"
    assert record.run["error"] == "ValueError: the device fell off the bus"
    assert (counts["completed"], counts["unfinished"]) == (6, 3)
    assert record.validity[0].startswith("failed: ValueError") and verify(outcome.directory) == []


def test_a_target_that_stalls_ends_the_run_with_a_record(tmp_path: Path) -> None:
    class Stalls(ScriptedTarget):
        def poll(self, deadline_ns: int | None) -> list[TokenEvent]:
            if self.clock.now_ns > 5_200_000_000:
                self.clock.now_ns += 1_000_000_000
                return []
            return super().poll(deadline_ns)

    class Subject(ScriptedSubject):
        def start(self) -> ScriptedTarget:
            return Stalls(self.clock, self.chunks, self.slots)

    outcome = run(replace(SCRIPTED, out=tmp_path / "run", stall_timeout=20.0), Subject())
    assert isinstance(outcome.failure, HarnessError)
    record = outcome.directory.read_record()
    assert record.run["error"].startswith("HarnessError: The target stalled: 3 requests in flight")
    assert record.metrics["counts"]["completed"] == 6 and verify(outcome.directory) == []


def test_requests_that_fail_are_counted_and_the_run_goes_on(tmp_path: Path) -> None:
    class Refuses(ScriptedSubject):
        def chunks(self, request: Request) -> Any:
            return [("error", 1)] if request.id % 3 == 0 else super().chunks(request)

    record = run(replace(SCRIPTED, out=tmp_path / "run"), Refuses()).record
    counts = record.metrics["counts"]
    assert (counts["completed"], counts["failed"], counts["intended"]) == (8, 4, 12)
    assert "4 requests failed" in record.validity


@dataclass
class RealTarget:
    """Answers each request with one token after 20 ms of real time, one request at once."""

    killed: Callable[[int], None]
    steps: list[Any] = field(default_factory=list)
    running = waiting = 0
    queue: deque[int] = field(default_factory=deque)

    def submit(self, request: Request) -> int:
        self.queue.append(request.id)
        return time.perf_counter_ns()

    def poll(self, deadline_ns: int | None) -> list[TokenEvent]:
        time.sleep(0.02)
        request = self.queue.popleft()
        self.killed(request)
        return [TokenEvent(request, time.perf_counter_ns(), 1, (), True)]

    def abort(self) -> None:
        self.queue.clear()


@pytest.mark.parametrize("killed", [False, True], ids=["", "killed"])
def test_a_killed_telemetry_process_costs_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    uncounted = NVML.replace("nvmlDeviceGetTotalEnergyConsumption", "unknown")  # so its power is summed
    put_before_others("pynvml", uncounted, tmp_path, monkeypatch)
    children: list[SensorProcess] = []

    class Subject(ScriptedSubject):
        @property
        def clock(self) -> Callable[[], int]:  # type: ignore[override]
            return time.perf_counter_ns

        def sensors(self) -> tuple[list[Sensor], list[str]]:
            children.append(SensorProcess(Source("nvidia", 0, ("GPU-1",))))
            return [HostSensor(), children[0]], []

        def start(self) -> Any:
            def kill(request: int) -> None:
                if killed and request == 20:
                    os.kill(children[0].pid, signal.SIGKILL)

            return RealTarget(kill)

    load = SCRIPTED.load | {"num_requests": 40, "output_lengths": "fixed:1", "concurrency": 1}
    outcome = run(replace(SCRIPTED, out=tmp_path / "run", load=load), object.__new__(Subject))
    record = outcome.directory.read_record()
    telemetry = outcome.directory.read_telemetry()
    powers = telemetry[telemetry["device"] == 0]
    assert record.run["status"] == "complete" and record.metrics["counts"]["completed"] == 40
    assert verify(outcome.directory) == []
    end_ns = record.metrics["whole_run"]["end_s"] * 1e9
    assert (powers["time_ns"] < end_ns).sum() >= 3, "ten a second at least"
    if killed:
        assert record.energy["joules_per_output_token"] is None
        assert record.energy["sensor_reasons"] == [
            "SensorProcess stopped: the sensor process was ended by SIGKILL"
        ]
        assert powers["time_ns"].max() < end_ns
    else:
        assert powers["time_ns"].max() >= end_ns
        assert record.energy["measured"]["whole_run"]["mean_power_w"] == pytest.approx(100.0)
        assert 0 < record.energy["sampler_cpu_share"] < 0.5
