"""The stages from a replay to a signed record, and from a killed run's log to one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backbench.errors import HarnessError
from backbench.harness import recording
from backbench.harness.memory import Readings
from backbench.harness.recording import Known, Measured, judged, numbers, tabulate, write, write_tables
from backbench.harness.replay import Replay, mode_of, replay
from backbench.harness.run_log import LOG_FILE, RunLog
from backbench.reports.record import RunDirectory
from backbench.reports.verify import verify


def known(workload: Any, **system: Any) -> Known:
    nothing: dict[str, Any] = {}
    return Known(
        run={"uuid": "u", "utc": "2026-01-01T00:00:00+00:00", "command": "bench run", "seed": 0, "repeat": 0},
        workload={"name": workload.name, "content_hash": "", "notes": [], "parameters": {}},
        model={"name": "m", "dtype": "float32"},
        engine=nothing,
        backend={"asked": "b", "used": {}},
        system={"device": {"vendor": "cpu", "name": "c", "arch": "a"} | system},
        software=nothing,
        warmup={"seconds": 0.0, "requests": 0},
        context={
            "mode": mode_of(workload),
            "batch_limit": 8,
            "concurrency": workload.concurrency,
            "gpus": 0,
            "slo_s": {},
            "ideal_prefix_hit_ratio": None,
            "shape": None,
            "peaks": {},
        },
        memory={"weights_bytes": 100, "kv_pool_bytes": 300},
    )


def measured(workload: Any, done: Replay, **system: Any) -> Measured:
    return Measured(known(workload, **system), done, [], [], ["no sensor"], Readings(weights_bytes=100))


def test_a_replay_becomes_a_record_that_verifies(
    tmp_path: Path, make_target: Any, make_workload: Any, clock: Any
) -> None:
    workload = make_workload([2, 1])
    done = replay(make_target({0: [(5, 1), (9, 1)], 1: [(7, 1)]}), workload, clock=clock)
    tables = tabulate(measured(workload, done))
    directory = RunDirectory.create(tmp_path / "run")
    write_tables(directory, tables)
    record = write(directory, numbers(tables), tables)
    assert record.run["status"] == "complete" and record.run["uuid"] == "u"
    assert record.run["start_unix_ns"] == done.start_unix_ns
    assert record.metrics["counts"]["completed"] == 2
    assert record.metrics["ttft_s"]["mean"] == pytest.approx(0.006)
    assert record.memory["weights_bytes"] == 100
    assert record.validity == ["correctness was not checked: the run ended before the check"]
    assert verify(directory) == []


def test_every_part_of_the_judgement_comes_from_the_record(
    make_target: Any, make_workload: Any, clock: Any
) -> None:
    workload = make_workload([1, 1])
    done = replay(make_target({0: [(5, 1)], 1: [("error", 1)]}), workload, clock=clock)
    done = replace(done, interrupted=True, failure=HarnessError("the card fell off the bus"))
    tables = tabulate(measured(workload, done, processes=2, interpreter=True))
    found = judged(numbers(tables), tables).validity
    assert any("fell off the bus" in reason for reason in found)
    assert any("interpreter" in reason for reason in found)
    assert any("requests failed" in reason for reason in found)
    assert any("2 other processes" in reason for reason in found)


def killed(path: Path, make_target: Any, make_workload: Any, clock: Any, data: dict[str, Any]) -> None:
    workload = make_workload([1, 1, 1], arrivals_ms=[0, 10, 20])
    target = make_target({0: [(5, 1)], 1: [(5, 1)], 2: [(500, 1)]}, interrupt_at_ms=20)
    log = RunLog.claim(path)
    log.begin(data, workload, (), clock)
    with log:
        replay(target, workload, clock=clock, on_trace=log.note)
    log.release()


def test_a_killed_run_is_recorded_by_the_same_stages(
    tmp_path: Path, make_target: Any, make_workload: Any, clock: Any
) -> None:
    data = recording.known_as_json(known(make_workload([1, 1, 1], arrivals_ms=[0, 10, 20])))
    killed(tmp_path / "run", make_target, make_workload, clock, data)
    record = recording.recover(tmp_path / "run")
    directory = RunDirectory.open(tmp_path / "run")
    assert directory.read_record().run["recovered"] is True
    assert record.run["status"] == "interrupted"
    counts = record.metrics["counts"]
    assert (counts["intended"], counts["completed"], counts["unfinished"]) == (3, 2, 1)
    assert record.memory["weights_bytes"] == 100 and record.memory["total_bytes"] is None
    assert "the run was killed" in record.energy["sensor_reasons"]
    assert any("killed before the check" in reason for reason in record.validity)
    assert verify(directory) == []
    with pytest.raises(HarnessError, match="holds no log"):
        recording.recover(tmp_path / "run")


@pytest.mark.parametrize("data", [{}, {"run": {}, "colour": "red"}])
def test_a_log_of_another_version_is_said_and_kept(
    tmp_path: Path, make_target: Any, make_workload: Any, clock: Any, data: dict[str, Any]
) -> None:
    killed(tmp_path / "run", make_target, make_workload, clock, data)
    with pytest.raises(HarnessError, match="another version"):
        recording.recover(tmp_path / "run")
    assert (tmp_path / "run" / LOG_FILE).exists()
