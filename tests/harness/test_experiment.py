"""What an experiment decides before and after its replay, and the whole of it on a scripted subject."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backbench.errors import HarnessError
from backbench.harness import experiment
from backbench.harness.experiment import Observer, default_directory, default_warmup
from backbench.harness.options import RunOptions
from backbench.harness.sensors.cpu import HostSensor
from backbench.harness.sensors.telemetry import Sensor
from backbench.harness.subjects.scripted import ScriptedSubject
from backbench.harness.subjects.subject import Facts
from backbench.reports.metrics.validity import UNCHECKED, fails
from backbench.reports.page.html import render_report
from backbench.reports.verify import verify
from backbench.workloads.request import Workload

SCRIPTED = RunOptions(
    workload="synthetic",
    backend="scripted",
    load={"input_lengths": "fixed:8", "output_lengths": "fixed:5", "num_requests": 12, "concurrency": 3},
)
"""Twelve requests of five tokens, three at a time, on a script: 50 ms to the first token, 10 ms each more."""


def scripted(options: RunOptions) -> ScriptedSubject:
    return ScriptedSubject()


def test_a_whole_experiment_on_a_script(tmp_path: Path) -> None:
    """No engine and no model: the record holds the script's own times, verifies, and its page renders."""
    options = replace(SCRIPTED, out=tmp_path / "run", warmup=0)
    outcome = experiment.run(options, Observer(), scripted)
    record = outcome.directory.read_record()
    assert record.run["status"] == "complete"
    assert record.metrics["counts"]["completed"] == 12
    assert record.metrics["ttft_s"]["mean"] == pytest.approx(0.050)
    assert record.metrics["tpot_s"]["mean"] == pytest.approx(0.010)
    assert record.metrics["e2e_s"]["mean"] == pytest.approx(0.090)
    assert record.metrics["whole_run"]["duration_s"] == pytest.approx(4 * 0.090), "four rounds of three"
    assert record.metrics["output_tokens_per_s"]["whole_run"] == pytest.approx(12 * 5 / 0.36)
    assert record.validity == ["correctness was not checked: a script has no results to check"]
    assert record.memory["total_bytes"] is None
    assert verify(outcome.directory) == []
    page = render_report([outcome.directory])
    assert "synthetic on scripted" in page
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"run.json", "requests.parquet", "steps.parquet", "telemetry.parquet"}


def test_sessions_stand_in_the_record(tmp_path: Path) -> None:
    """Four sessions of three turns, two at a time: three answers of 90 ms and two thoughts of 20 ms each."""
    load = SCRIPTED.load | {"turns": "3", "think_ms": "20", "concurrency": 2}
    outcome = experiment.run(
        replace(SCRIPTED, load=load, out=tmp_path / "run", warmup=0), Observer(), scripted
    )
    record, frame = outcome.record, outcome.directory.read_requests()
    assert record.metrics["whole_run"]["duration_s"] == pytest.approx(2 * (3 * 0.090 + 2 * 0.020))
    assert record.metrics["ttft_s"]["max"] == pytest.approx(0.050), "thinking is not waiting"
    assert record.workload["parameters"]["sessions"] == {"begun": 4, "later_turns": 8}
    assert record.metrics["fidelity"]["exact_lengths"] == 1
    assert frame["turn"].tolist() == [1, 2, 3] * 4
    assert frame["follows"].isna().tolist() == [True, False, False] * 4
    assert frame["prompt_tokens"].tolist() == [8, 21, 34] * 4
    assert verify(outcome.directory) == []
    assert "Outputs of the recorded length" in render_report([outcome.directory])


def test_how_long_the_schedule_is_is_said_before_the_replay(tmp_path: Path) -> None:
    class Heard(Observer):
        def __init__(self) -> None:
            self.said: list[str] = []

        def stage(self, text: str) -> None:
            self.said.append(text)

    timed = {"rate": 2.0, "arrival": "constant", "num_requests": 5}
    load = {name: value for name, value in SCRIPTED.load.items() if name != "concurrency"} | timed
    due = "The last request is due after "
    for name, own, told in (("open", load, [f"{due}0:00:02"]), ("closed", SCRIPTED.load, [])):
        heard = Heard()
        experiment.run(replace(SCRIPTED, load=own, out=tmp_path / name, warmup=0), heard, scripted)
        assert [text for text in heard.said if text.startswith(due)] == told
        assert heard.said.index("Replaying synthetic") == len(told) + 1


def test_a_run_that_is_not_to_be_checked_says_so_and_fails_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: Any) -> Any:
        raise AssertionError("the results were checked")

    monkeypatch.setattr(ScriptedSubject, "check", forbidden)
    options = replace(SCRIPTED, out=tmp_path / "run", check=False)
    outcome = experiment.run(options, Observer(), scripted)
    record = outcome.directory.read_record()
    assert record.accuracy == {"reason": "not asked for (--no-check)"}
    assert record.validity == [UNCHECKED] and not fails(record)
    assert record.correctness["passed"] is None and verify(outcome.directory) == []


def test_a_script_needs_neither_engine_nor_torch_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("the experiment reached for the engine")

    monkeypatch.setattr("backbench.engine.engine.Engine.__init__", forbidden)
    monkeypatch.setattr("backbench.engine.models.checkpoint.find_model", forbidden)
    experiment.run(replace(SCRIPTED, out=tmp_path / "run"), Observer(), scripted)


def test_one_run_is_made_here_and_no_series(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match="bench run --repeat"):
        experiment.run(replace(SCRIPTED, out=tmp_path / "runs", repeat=3), Observer(), scripted)
    assert not (tmp_path / "runs").exists()


def test_label_and_tags_are_names_and_nothing_asked(tmp_path: Path) -> None:
    options = replace(SCRIPTED, out=tmp_path / "run", label="night", tags={"commit": "a1"})
    run = experiment.run(options, Observer(), scripted).directory.read_record().run
    assert (run["label"], run["tags"]) == ("night", {"commit": "a1"})
    assert {"label", "tag"}.isdisjoint(run["asked"]) and {"label", "tag"} <= options.asked().keys()


def test_the_default_directory_says_what_ran_and_never_collides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiment, "default_directory", lambda options: Path("runs/now-synthetic-scripted"))
    paths = [experiment.run(SCRIPTED, Observer(), scripted).directory.path for _ in range(3)]
    assert [str(path) for path in paths] == [
        f"runs/now-synthetic-scripted{suffix}" for suffix in ("", "-1", "-2")
    ]
    mix = default_directory(RunOptions(workload="mix:sharegpt=0.7,azure-code=0.3", backend="torch"))
    assert mix.name.endswith("-mix-sharegpt=0.7,azure-code=0.3-torch")
    name = default_directory(RunOptions(workload="data/batch:2x3+4", backend="torch"))
    assert name.parts[0] == "runs"
    assert name.name.endswith("Z-batch-2x3+4-torch")


def test_the_resident_set_of_a_run_holds_nothing_of_the_check_before_it(tmp_path: Path) -> None:
    """A check that leaves 256 MiB of small pieces, in a circle, below one that stays in use."""
    kept: list[bytearray] = []

    class Hungry(ScriptedSubject):
        def sensors(self) -> tuple[list[Sensor], list[str]]:
            return [HostSensor()], []

        def check(self, workload: Workload) -> dict[str, Any]:
            circle: list[Any] = [bytearray(b"x" * 2**16) for _ in range(4096)]
            circle.append(circle)
            kept.append(bytearray(b"x" * 2**16))
            return super().check(workload)

    outcomes = [
        experiment.run(replace(SCRIPTED, out=tmp_path / name), Observer(), lambda options: Hungry())
        for name in ("first", "second")
    ]
    first, second = (outcome.record.memory["host_rss_peak_bytes"] for outcome in outcomes)
    assert second < first + 128 * 2**20
    for outcome in outcomes:
        sampled_s = outcome.directory.read_telemetry()["time_ns"] / 1e9
        ended_s = outcome.record.metrics["whole_run"]["end_s"]
        assert sampled_s.max() == pytest.approx(ended_s), "telemetry and replay are on the script's clock"


def test_a_home_never_reaches_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in the model's name nor in the workload's file."""
    monkeypatch.setenv("HOME", str(tmp_path / "ada"))

    class AtHome(ScriptedSubject):
        def facts(self) -> Facts:
            facts = super().facts()
            return replace(facts, model=facts.model | {"name": str(tmp_path / "ada" / "models" / "mine")})

    outcome = experiment.run(replace(SCRIPTED, out=tmp_path / "run"), Observer(), lambda options: AtHome())
    assert outcome.record.model["name"] == "~/models/mine"
    assert str(tmp_path / "ada") not in (outcome.directory.path / "run.json").read_text()


def test_warmup_absorbs_a_closed_loops_burst(make_workload: Any) -> None:
    assert default_warmup(make_workload([1] * 40, concurrency=20)) == 20
    assert default_warmup(make_workload([1] * 8, concurrency=20)) == 8
    assert default_warmup(make_workload([1] * 40)) == 16


def test_running_out_of_memory_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class OutOfMemoryError(RuntimeError):
        pass

    def full(*_: Any) -> Any:
        raise OutOfMemoryError("CUDA out of memory. Tried to allocate ...")

    monkeypatch.setattr(experiment, "_prepare", full)
    options = RunOptions(workload="sharegpt", backend="torch", out=tmp_path / "run")
    with pytest.raises(HarnessError, match="--max-seqs"):
        experiment.run(options, Observer())
    assert not (tmp_path / "run").exists()


def test_other_errors_are_not_dressed_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("a defect")

    monkeypatch.setattr(experiment, "_prepare", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        experiment.run(RunOptions(workload="sharegpt", backend="torch", out=tmp_path / "run"), Observer())
