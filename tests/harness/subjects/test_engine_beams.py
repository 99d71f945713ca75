"""`bench run --beams`: every request is answered by beam search, and the record says what sharing saved."""

from __future__ import annotations

from pathlib import Path

import pytest

from backbench.harness.cli import run_command
from backbench.reports.record import RunDirectory

RUN = [
    "run",
    "-b",
    "torch",
    "-w",
    "synthetic",
    "-n",
    "4",
    "--concurrency",
    "2",
    "--warmup",
    "1",
    "--no-check",
    "--quiet",
]
RUN += ["--input-lengths", "fixed:20", "--output-lengths", "fixed:5", "--max-len", "64", "--no-report"]


def test_a_run_by_beam_search(tmp_path: Path) -> None:
    assert run_command([*RUN, "--beams", "3", "--max-seqs", "8", "-o", str(tmp_path / "run")]) == 0
    record = RunDirectory.open(tmp_path / "run").read_record()
    assert record.engine["beams"] == 3 and record.engine["length_penalty"] == 1
    assert 0 < record.engine["beam_blocks_peak"] < record.engine["beam_blocks_peak_unshared"]
    assert record.metrics["counts"]["completed"] == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-seqs", "2"], "--beams 3 needs as many sequences"),
        (["--temperature", "1"], "give --temperature 0"),
        (["--num-blocks", "4"], "KV blocks"),
        (["--speculate", "ngram:2"], "--beams and --speculate do not go together"),
    ],
)
def test_what_cannot_be_searched_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert run_command([*RUN, "--beams", "3", *options, "-o", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
