"""`bench compare` over experiments: the winner first, what is left out, what is refused, and every form."""

from __future__ import annotations

import csv
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from backbench.harness.cli import run_command
from backbench.reports.loaded import load
from backbench.reports.record import RunDirectory, sign
from backbench.reports.record.experiment import Experiment, Listed

OLD = Path(__file__).parents[2] / "reports" / "fixtures" / "schema-1"
SPREAD = (0.0, 0.004, -0.003, 0.002, -0.004, 0.001, 0.003, -0.002)


def bench(*arguments: object) -> int:
    """The exit code of a command, however it ends."""
    try:
        return run_command([*map(str, arguments)])
    except SystemExit as end:
        return int(end.code or 0)


def made(path: Path, faster: float, blocks: int = 8, doubtful: int | None = None, **about: str) -> Path:
    """An experiment of torch and sdpa in which only rates and the median TPOT are other than a real run's."""
    path.mkdir()
    runs = []
    for block in range(blocks):
        for backend, speed in (("torch", 1.0), ("sdpa", faster)):
            rate = 100 * speed * (1 + SPREAD[block] * (1 if backend == "torch" else -1))
            name = f"{len(runs)}-{backend}"
            directory = RunDirectory(shutil.copytree(OLD / backend, path / name))
            record = directory.read_record()
            tpot = record.metrics["tpot_s"] | {"p50": {"value": 1 / rate, "low": None, "high": None}}
            rates = {"whole_run": rate, "steady_state": None}
            record = replace(
                record,
                run=record.run | {"seed": block, "uuid": name},
                workload=record.workload | {"content_hash": f"draw {block}"} | about,
                metrics=record.metrics | {"output_tokens_per_s": rates, "tpot_s": tpot},
                validity=["disturbed: others took 40%"] if doubtful == block and backend == "sdpa" else [],
            )
            directory.write_record(sign(directory, record))
            runs.append(Listed(name, backend, block, block, name))
    Experiment(path, ("torch", "sdpa"), blocks, "bench run", tuple(runs)).write()
    return path


def test_the_winner_is_named_before_any_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("compare", made(tmp_path / "x", 1.83)) == 0
    told = capsys.readouterr()
    assert told.out.startswith(
        "sdpa is fastest by Output tok/s, whole run: 1.83× (1.82–1.84) torch, n = 8 pairs."
    )
    assert told.err == ""


def test_a_disturbed_run_is_left_out_with_its_pair(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = made(tmp_path / "x", 1.83, doubtful=2)
    said = "pair 3 left out: sdpa: disturbed: others took 40%"
    for form in ((), ("--json",), ("--csv",), ("--markdown",)):
        assert bench("compare", path, *form) == 0
        told = capsys.readouterr()
        assert told.err == f"{said}\n"
        if form == ("--json",):
            found = json.loads(told.out)
            assert found["left_out"] == [said] and "n = 7 pairs" in found["conclusion"]
        elif form != ("--csv",):
            assert "n = 7 pairs. Left out as not valid: 1 of 16 runs." in told.out


def test_whoever_reads_the_values_sees_which_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = made(tmp_path / "x", 1.83, blocks=3, doubtful=2)
    assert bench("show", path, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["left_out"] == ["pair 3 left out: sdpa: disturbed: others took 40%"]
    rates = found["quantities"]["metrics.output_tokens_per_s.whole_run"]
    assert [len(rates[arm]["values"]) for arm in ("torch", "sdpa")] == [3, 2]
    values = load(path).values
    assert list(values["left_out"].notna()) == [False] * 5 + [True]


def test_two_experiments_are_pooled_by_backend(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = made(tmp_path / "x", 1.5), made(tmp_path / "y", 1.5)
    assert bench("compare", *paths, "--group-by", "backend") == 0
    assert "1.50× (1.50–1.50) torch, n = 16 pairs." in capsys.readouterr().out
    assert bench("compare", *paths, "--group-by", "vendor") == 2
    assert "compared with each other" in capsys.readouterr().err
    assert bench("compare", OLD / "torch", OLD / "sdpa", "--group-by", "vendor") == 2
    assert "All runs are of one vendor: cpu" in capsys.readouterr().err


def test_the_incomparable_is_refused_by_name_and_marked_anyway(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(tmp_path / "x", 1.5)
    other = made(tmp_path / "y", 1.5, content_hash="another")
    paths = tmp_path / "x", other / "1-sdpa"
    assert bench("compare", *paths) == 4
    assert capsys.readouterr().err.startswith("error: These runs do not compare: workload: draw 0 vs ")
    assert bench("compare", *paths, "--anyway") == 0
    told = capsys.readouterr()
    assert told.out.lstrip().startswith("NOT COMPARABLE") and "×" in told.out
    assert told.err.startswith("not comparable: workload: ")
    for word in (" better", " worse", "fastest"):
        assert word not in told.out
    assert bench("compare", *paths, "--anyway", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["comparable"] is False and found["conclusion"] is None
    assert {value for row in found["metrics"] for key, value in row.items() if "verdict" in key} == {""}
    assert bench("compare", *paths, "--anyway", "--markdown") == 0
    assert capsys.readouterr().out.startswith("Not comparable: workload: ")
    assert bench("compare", *paths, "--anyway", "--fail-if", "tpot_p50>1.05") == 4


def test_a_limit_is_not_judged_of_what_does_not_compare(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Eight pairs that would break it, whose requests got other numbers of tokens."""
    path = made(tmp_path / "x", 0.5)
    for run in path.glob("*-sdpa"):
        directory = RunDirectory(run)
        record = directory.read_record()
        record = replace(record, metrics=record.metrics | {"output_tokens": 1})
        directory.write_record(sign(directory, record))
    assert bench("compare", path, "--anyway", "--fail-if", "tpot_p50>1.05") == 4
    assert capsys.readouterr().err.startswith("error: These runs do not compare: output tokens: ")


def test_a_limit_fails_only_on_what_is_real(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = made(tmp_path / "x", 0.9)
    assert bench("compare", path, "--fail-if", "tpot_p50>1.05") == 1
    assert "failed: TPOT p50 of sdpa against torch is 1.11×" in capsys.readouterr().err
    assert bench("compare", path, "--fail-if", "tpot_p50>1.2") == 0
    assert bench("compare", path, "--baseline", "sdpa", "--fail-if", "tpot_p50>1.05") == 0


def test_csv_holds_every_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("compare", made(tmp_path / "x", 1.5, blocks=2), "--csv") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    rates = [row for row in rows if row["quantity"] == "metrics.output_tokens_per_s.whole_run"]
    assert [row["run"] for row in rates] == ["torch, run 1", "torch, run 2", "sdpa, run 1", "sdpa, run 2"]
    assert float(rates[0]["value"]) == 100.0
