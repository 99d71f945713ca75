"""What an experiment decides before and after its replay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from backbench.errors import HarnessError
from backbench.harness import experiment
from backbench.harness.experiment import Observer, default_directory, default_warmup
from backbench.harness.options import RunOptions


def test_the_default_directory_says_what_ran_and_never_collides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = RunOptions(workload="data/batch:2x3+4", backend="torch")
    first = default_directory(options)
    assert first.parts[0] == "runs"
    assert first.name.endswith("Z-batch-2x3+4-torch")
    first.mkdir(parents=True)
    assert default_directory(options) != first


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


def test_each_run_starts_with_a_cold_cache(tmp_path: Path) -> None:
    """In a pool too small for the correctness check, which would empty the cache by itself."""
    options = RunOptions(
        workload="batch:3x80+4",
        backend="torch",
        repeat=2,
        warmup=0,
        out=tmp_path / "runs",
        engine={"num_blocks": 18},
    )
    outcomes = experiment.run(options, Observer())
    assert len(outcomes) == 2
    for outcome in outcomes:
        assert outcome.record.correctness["passed"] is None
        steps = pd.read_parquet(outcome.directory.path / "steps.parquet")
        assert steps["num_prefill_tokens"].sum() == 3 * 80
        assert steps["prefix_hit_tokens"].sum() == 0
