"""Exports, read by their consumers' own code or checked against the formats that these publish."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backbench.errors import ReportError
from backbench.harness.cli import run_command
from backbench.reports.arms import Arm, Run, measured, open_arms
from backbench.reports.export.format import Export, export_named, exports, write_export
from backbench.reports.limits import names_of
from backbench.reports.quantities import QUANTITIES, quantity
from backbench.reports.record import RunDirectory

OLD = Path(__file__).parents[1] / "fixtures" / "schema-1"
RUN = OLD / "torch"


@pytest.fixture
def arms() -> list[Arm]:
    return open_arms([RUN, OLD / "sdpa"])


@pytest.fixture
def repeated(make_run: Callable[..., RunDirectory]) -> Arm:
    """An arm of four runs."""
    runs = [make_run(seed=seed) for seed in (1, 2, 3, 4)]
    return Arm("torch", tuple(Run(each.read_record(), i, each) for i, each in enumerate(runs)))


def exported(name: str, arms: list[Arm], folder: Path) -> dict[str, Any]:
    """The files of an export, read back."""
    paths = write_export(export_named(name), arms, folder / "out.json")
    return {path.name: json.loads(path.read_text()) for path in paths}


def test_the_formats_declare_themselves() -> None:
    assert [each.name for each in exports()] == [
        "bencher",
        "github-action-benchmark",
        "pytest-benchmark",
        "vllm",
    ]
    assert all(isinstance(each, Export) and each.description for each in exports())


def test_short_names_are_distinct_and_fit_benchers_slugs() -> None:
    names = [names_of(each)[1] for each in QUANTITIES]
    assert len(set(names)) == len(names)
    assert max(map(len, names)) <= 64


def test_bencher(arms: list[Arm], tmp_path: Path) -> None:
    """https://bencher.dev/bmf.json: benchmark -> measure -> {value, lower_value?, upper_value?}: numbers."""
    (found,) = exported("bencher", arms, tmp_path).values()
    assert list(found) == ["torch", "sdpa"]
    for measures in found.values():
        for name, metric in measures.items():
            assert name == name.lower() and " " not in name and "_" not in name and len(name) <= 64
            assert {"value"} <= metric.keys() <= {"value", "lower_value", "upper_value"}
            assert all(isinstance(each, int | float) for each in metric.values())
    reading = measured(arms[0], quantity("metrics", "ttft_s", "p50"))
    expected = {"value": reading.value, "lower_value": reading.low, "upper_value": reading.high}
    assert found["torch"]["ttft-p50"] == expected
    assert "ttft-p99" not in found["torch"]  # 24 requests support none


def test_github_action_benchmark(arms: list[Arm], tmp_path: Path) -> None:
    """Each of its two files: [{name, unit, value, range?, extra?}], names distinct, one direction."""
    found = exported("github-action-benchmark", arms, tmp_path)
    assert list(found) == ["out.smaller.json", "out.bigger.json"]
    for entries in found.values():
        names = [entry["name"] for entry in entries]
        assert names and len(set(names)) == len(names)
        for entry in entries:
            assert {"name", "unit", "value"} <= entry.keys() <= {"name", "unit", "value", "range", "extra"}
            assert isinstance(entry["value"], int | float)
            assert all(isinstance(entry[key], str) for key in entry.keys() - {"value"})
    smaller, bigger = ({entry["name"]: entry for entry in each} for each in found.values())
    assert smaller["torch: TTFT p50"] == {
        "name": "torch: TTFT p50",
        "unit": "s",
        "value": 0.026993502,
        "range": "0.01755 to 0.04937",
        "extra": "one run, 95 % within it\n" + quantity("metrics", "ttft_s", "p50").definition,
    }
    assert "sdpa: Output tok/s, whole run" in bigger and "sdpa: Output tok/s, whole run" not in smaller


def test_pytest_benchmark_compares_it(arms: list[Arm], tmp_path: Path) -> None:
    exported("pytest-benchmark", arms, tmp_path)
    command = [sys.executable, "-m", "pytest_benchmark", "compare", "out.json", "--csv=out.csv"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "benchmark 'ttft_p50': 2 tests" in done.stdout
    rows = (tmp_path / "out.csv").read_text().splitlines()
    (row,) = [each for each in rows if "ttft_p50[torch]" in each]
    assert "0.026993502" in row


def test_pytest_benchmarks_statistics_are_its_own(repeated: Arm, tmp_path: Path) -> None:
    from pytest_benchmark.stats import Stats

    (found,) = exported("pytest-benchmark", [repeated], tmp_path).values()
    assert found["benchmarks"]
    for each in found["benchmarks"]:
        theirs = Stats()
        for value in each["stats"]["data"]:
            theirs.update(value)
        assert each["stats"]["rounds"] == 4
        ours = dict(each["stats"])
        for name in ("min", "max", "mean", "stddev", "median", "rounds", "ops", "total", "stddev_outliers"):
            assert ours[name] == pytest.approx(getattr(theirs, name), rel=1e-12), name


def test_a_repeated_arm_exports_the_median_and_the_interval_between_runs(
    repeated: Arm, tmp_path: Path
) -> None:
    (found,) = exported("bencher", [repeated], tmp_path).values()
    reading = measured(repeated, quantity("metrics", "tpot_s", "p50"))
    assert reading.low is not None
    assert found["torch"]["tpot-p50"] == {
        "value": reading.value,
        "lower_value": reading.low,
        "upper_value": reading.high,
    }


SUMMARY = [f"{at}_{name}_ms" for name in ("ttft", "tpot", "itl", "e2el") for at in ("mean", "median", "std")]
DETAILS = ("input_lens", "output_lens", "ttfts", "itls", "start_times", "errors")


def test_vllm_has_the_keys_that_its_readers_take(tmp_path: Path) -> None:
    (found,) = exported("vllm", open_arms([RUN]), tmp_path).values()
    wanted = ["output_throughput", "total_token_throughput", "request_throughput", "completed", "failed"]
    wanted += ["max_concurrency", "request_rate", "model_id", "duration", "date", "num_prompts"]
    assert {*wanted, *SUMMARY, *DETAILS} <= found.keys()
    assert {len(found[name]) for name in DETAILS} == {24}
    assert (found["max_concurrency"], found["request_rate"], found["model_id"]) == (16, "inf", "tiny")
    assert "p99_ttft_ms" not in found and "p50_ttft_ms" in found


def test_vllms_numbers_follow_from_its_lists_by_its_formulas(tmp_path: Path) -> None:
    """vllm/benchmarks/serve.py, calculate_metrics, over what --save-detailed keeps."""
    (found,) = exported("vllm", open_arms([RUN]), tmp_path).values()
    ttfts, itls = np.array(found["ttfts"]), [np.array(each) for each in found["itls"]]
    latency = ttfts + [each.sum() for each in itls]
    lengths = np.array(found["output_lens"])
    samples = {
        "ttft": ttfts,
        "tpot": (latency - ttfts)[lengths > 1] / (lengths[lengths > 1] - 1),
        "itl": np.concatenate(itls),
        "e2el": latency,
    }
    for name, values_s in samples.items():
        assert found[f"mean_{name}_ms"] == pytest.approx(np.mean(values_s) * 1000, rel=1e-9)
        assert found[f"median_{name}_ms"] == pytest.approx(np.median(values_s) * 1000, rel=1e-9)
        assert found[f"std_{name}_ms"] == pytest.approx(np.std(values_s) * 1000, rel=1e-9)
    total = found["total_output_tokens"]
    assert total == lengths.sum()
    assert found["output_throughput"] == pytest.approx(total / found["duration"])
    record = RunDirectory.open(RUN).read_record()
    assert found["mean_ttft_ms"] == pytest.approx(record.metrics["ttft_sent_s"]["mean"] * 1000)


def test_vllm_takes_one_run(arms: list[Arm], tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="holds one run, and these are 2"):
        exported("vllm", arms, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--format", "exel", "-o", "new.json"], "there are bencher, github-action-benchmark"),
        (["--format", "bencher", "-o", "taken.json"], "File exists"),
        (["--format", "bencher", "-o", "nowhere/new.json"], "No such file"),
    ],
)
def test_what_cannot_be_exported_is_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.json").write_text("mine")
    assert run_command(["export", str(RUN), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and len(line) < 300
    assert (tmp_path / "taken.json").read_text() == "mine"


def test_vllm_leaves_failed_requests_out_and_keeps_their_place(
    tmp_path: Path, make_run: Callable[..., RunDirectory]
) -> None:
    run = make_run(seed=9)
    frame = run.read_requests()
    frame.loc[2, ["finished", "error"]] = [False, "refused"]
    run.write_requests(frame)
    (found,) = exported("vllm", open_arms([run.path]), tmp_path).values()
    assert (found["completed"], found["failed"], found["num_prompts"]) == (119, 1, 120)
    assert (found["ttfts"][2], found["itls"][2], found["output_lens"][2]) == (0.0, [], 0)
    assert found["errors"][2] and not found["errors"][1]
    assert found["mean_ttft_ms"] == pytest.approx(1000 * np.mean(found["ttfts"]) * 120 / 119)
