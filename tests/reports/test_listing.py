"""Every run below a directory is listed, whatever state it is in, and the newest finished one is found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from backbench.errors import ReportError
from backbench.reports.listing import entries, latest
from backbench.reports.record import RunDirectory, RunRecord
from backbench.reports.record.experiment import Experiment, Listed


def made(
    path: Path, minute: int, status: str = "complete", rate: float = 1.0, **changes: object
) -> RunRecord:
    """A run directory with a record of nothing but a name, a time and a rate."""
    run = {"status": status, "utc": f"2026-01-01T00:{minute:02d}:00+00:00", "uuid": path.name}
    record = RunRecord(
        run=run | {key: value for key, value in changes.items() if key in ("label", "tags")},
        backend={"asked": "torch"},
        model={"name": "tiny", "quantization": changes.get("quantization")},
        workload={"name": "synthetic"},
        metrics={"output_tokens_per_s": {"whole_run": rate}},
        validity=changes.get("validity", []),  # type: ignore[arg-type]
    )
    RunDirectory.create(path).write_record(record)
    return record


def experiment(path: Path, blocks: int, minutes: list[int]) -> None:
    """One of two arms whose first runs, as many as there are minutes, have finished."""
    path.mkdir()
    turns = [(block, arm) for block in range(blocks) for arm in ("torch", "sdpa")]
    runs = []
    for minute, (block, arm) in zip(minutes, turns, strict=False):
        name = f"{len(runs)}-{arm}"
        made(path / name, minute, rate=10.0 + block, label="pair")
        runs.append(Listed(name, arm, block, block, name))
    Experiment(path, ("torch", "sdpa"), blocks, "bench run", tuple(runs)).write()


def test_runs_come_by_time_and_an_experiment_arm_by_arm(tmp_path: Path) -> None:
    made(tmp_path / "b" / "deep", 3, label="night", tags={"card": "left"}, quantization="fp8")
    made(tmp_path / "a", 9)
    experiment(tmp_path / "x", 2, [4, 5, 6, 7])
    made(tmp_path / "x" / "kept", 8, "interrupted")
    found = entries(tmp_path)
    assert [(each.path.name, each.backend, each.runs) for each in found] == [
        ("deep", "torch", 1),
        ("x", "torch", 2),
        ("x", "sdpa", 2),
        ("kept", "torch", 1),
        ("a", "torch", 1),
    ]
    assert (found[0].label, found[0].tags, found[0].quantization) == ("night", (("card", "left"),), "fp8")
    assert found[1].output_tokens_per_s == 10.5


def test_what_is_not_valid_is_said(tmp_path: Path) -> None:
    made(tmp_path / "a", 1, validity=["disturbed: others"])
    made(tmp_path / "b", 2, validity=["3 requests failed"])
    made(tmp_path / "c", 3, "interrupted", validity=["interrupted: 1 of 2"])
    assert [each.validity for each in entries(tmp_path)] == ["disturbed", "not valid", "interrupted"]


def test_nothing_is_hidden(tmp_path: Path) -> None:
    for name, content in (("cut", '{"run": '), ("future", '{"schema_version": 99}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(content)
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "requests.log.jsonl").write_text("{}\n")
    experiment(tmp_path / "empty", 2, [])
    experiment(tmp_path / "gone", 1, [1, 2])
    (tmp_path / "gone" / "0-torch" / "run.json").unlink()
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "experiment.json").write_text("[]")
    found = {each.path.name: each.problem or "" for each in entries(tmp_path)}
    for name, words in (
        ("cut", "not valid JSON"),
        ("future", "99"),
        ("killed", "bench recover"),
        ("empty", "without a finished run"),
        ("gone", "0-torch"),
        ("list", "holds no experiment"),
    ):
        assert words in found[name], name
    assert found["1-sdpa"] == "", "the run that is left of a broken experiment"


def test_latest_is_the_newest_that_finished(tmp_path: Path) -> None:
    made(tmp_path / "old", 1, label="night")
    made(tmp_path / "new", 2)
    made(tmp_path / "cut", 3, "interrupted", label="night")
    experiment(tmp_path / "half", 2, [4, 5, 6])
    assert latest(tmp_path) == tmp_path / "new"
    assert latest(tmp_path, "night") == tmp_path / "old"
    experiment(tmp_path / "whole", 1, [7, 8])
    assert latest(tmp_path) == latest(tmp_path, "pair") == tmp_path / "whole"
    with pytest.raises(ReportError, match="no finished run labelled 'day'"):
        latest(tmp_path, "day")


def test_latest_goes_by_the_moment_and_not_by_its_text(tmp_path: Path) -> None:
    record = made(tmp_path / "b", 5)
    made(tmp_path / "a", 5)
    assert latest(tmp_path) == tmp_path / "b", "of one second, by name"
    east = replace(record, run=record.run | {"utc": "2026-01-01T01:04:00+01:00"})
    RunDirectory.create(tmp_path / "c").write_record(east)
    assert latest(tmp_path) == tmp_path / "b"


def test_no_directory_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="There is no directory"):
        entries(tmp_path / "none")
