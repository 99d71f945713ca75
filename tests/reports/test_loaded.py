"""A run in a notebook: DataFrames, metrics, comparison, and no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import backbench
from backbench.errors import ReportError
from backbench.reports.record import RunDirectory

OLD = Path(__file__).parent / "fixtures" / "schema-1"
DOCS = Path(__file__).parents[2] / "docs" / "notebook.md"

WITHOUT_TORCH = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "triton", "transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import backbench
assert not {"pandas", "numpy", "pyarrow"} & {*sys.modules}, "importing backbench must stay cheap"
run = backbench.load(sys.argv[1])
print(len(run.requests), len(run.steps), len(run.telemetry), run.metrics["output_tokens"])
print(len(backbench.compare(sys.argv[1:])))
"""


def python(*arguments: str, cwd: Path | None = None) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def blocks() -> list[str]:
    return [part.partition("```")[0] for part in DOCS.read_text().split("```python\n")[1:]]


def test_load_needs_no_torch() -> None:
    lines = python("-c", WITHOUT_TORCH, str(OLD / "torch"), str(OLD / "sdpa")).splitlines()
    assert lines[0].split() == ["24", "1502", "386", "10301"]
    assert int(lines[1]) > 30


def test_the_documented_script_runs(tmp_path: Path) -> None:
    (tmp_path / "runs").symlink_to(OLD)
    assert "TTFT: median 0.027 s, in the record 0.027 s" in python("-c", blocks()[0], cwd=tmp_path)


@pytest.mark.slow
def test_the_documented_experiment_runs(tmp_path: Path) -> None:
    assert "whole_run" in python("-c", blocks()[1], cwd=tmp_path)


def test_measured_requests_stand_apart_from_the_warm_up(cpu_run: RunDirectory, tmp_path: Path) -> None:
    frame = cpu_run.read_requests()
    frame.loc[3, "warmup"] = True
    other = RunDirectory.create(tmp_path / "run")
    other.write_requests(frame)
    other.write_record(cpu_run.read_record())
    run = backbench.load(other.path)
    assert (len(run.requests), run.warmup_requests["request_id"].tolist()) == (len(frame) - 1, [3])
    assert any("requests.parquet" in problem for problem in run.problems)


def test_runs_that_do_not_compare_are_refused(cpu_run: RunDirectory) -> None:
    with pytest.raises(ReportError, match="do not compare"):
        backbench.compare([cpu_run.path, OLD / "torch"])


def test_unknown_names_are_attribute_errors() -> None:
    assert not hasattr(backbench, "nothing")
    assert {"load", "compare", "run", "Backend", "Target"} <= {*dir(backbench)}
    assert backbench.Backend.__name__ == "Backend"
    assert backbench.Target.__name__ == "Target"
