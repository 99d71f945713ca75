"""`bench run --find-load` on the bundled model: one process, one load of the model, a directory of probes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from backbench.errors import INCONCLUSIVE
from backbench.harness.cli import run_command
from backbench.reports.record.experiment import read_experiment
from backbench.reports.record.search import read_search


@pytest.mark.parametrize("tp", [1, 2])
def test_a_search_is_run_shown_and_verified(
    tp: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No answer comes within a microsecond: two probes, and a sentence that says so. A model on several
    devices is given back for the check of the first probe's results, and loaded again."""
    out = tmp_path / "search"
    command = [sys.executable, "-m", "backbench", "run", "-w", "synthetic", "-b", "torch", "--find-load"]
    command += [
        "--slo",
        "e2e_p50=0.000001",
        "--concurrency",
        "2",
        "-n",
        "8",
        "--max-len",
        "64",
        "-o",
        str(out),
    ]
    command += ["--input-lengths", "fixed:8", "--output-lengths", "fixed:4", "--tp", str(tp)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == INCONCLUSIVE, done.stderr
    assert done.stderr.count("Loading tiny") == tp
    assert "No load holds e2e_p50 1e-06 s; it does not at 1 at once, the lowest tried." in done.stdout
    assert [(probe.load, probe.verdict) for probe in read_search(out).probes] == [(2, "fails"), (1, "fails")]
    for run in read_experiment(out).runs:
        record = read_experiment(out).directory(run).read_record()
        assert record.correctness["passed"] is True and record.engine["tp"] == tp
        assert len(record.memory.get("devices", [])) == (tp if tp > 1 else 0)
    assert (out / "report.html").exists()
    assert run_command(["verify", str(out)]) == 0
    capsys.readouterr()
    assert run_command(["show", str(out)]) == 0
    said = capsys.readouterr().out
    assert "No load holds" in said and "0.0 % (0.0" in said
    assert run_command(["show", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["highest_load"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--slo", "ttft_p95=1"], "is a percentile, for --find-load"),
        (["--find-load"], "give --slo"),
        (["--find-load", "--slo", "ttft=1"], "ttft_p95=1"),
        (["--find-load", "--slo", "ttft_p0=1"], "--slo takes"),
        (["--find-load", "--slo", "ttft_p=1"], "--slo takes"),
        (["--find-load", "--slo", "ttft_p95=1,ttft_p50=1"], "names ttft twice"),
    ],
)
def test_what_cannot_be_asked_is_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["run", "-w", "synthetic", "-b", "torch", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line and len(line) < 300
