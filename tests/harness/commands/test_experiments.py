"""An experiment directory end to end on the bundled model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import backbench
from backbench.harness.cli import run_command
from backbench.reports.loaded import LoadedExperiment


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Two backends, two blocks of two short requests; and what was printed."""
    out = tmp_path_factory.mktemp("experiment") / "x"
    command = [sys.executable, "-m", "backbench", "run", "-w", "batch:2x8+4", "-b", "torch,sdpa"]
    command += ["--repeat", "2", "--warmup", "1", "--max-len", "64", "-o", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def bench(*arguments: object) -> int:
    return run_command([*map(str, arguments)])


def test_the_directory_holds_every_run_and_one_report(made: tuple[Path, str]) -> None:
    out, said = made
    assert {each.name for each in out.iterdir()} == {
        *("1-torch", "2-sdpa", "3-sdpa", "4-torch"),
        *("experiment.json", "report.html"),
    }
    assert not (out / "1-torch" / "report.html").exists()
    assert said.count("n = 2") == 1 and "95 % between runs" in said


def test_it_is_shown_verified_and_compared_as_one(
    made: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = made
    for command in ("show", "verify", "compare"):
        assert bench(command, out) == 0
    said = capsys.readouterr().out
    assert "every number that its tables give follows from them" in said
    assert "Medians of runs with 95 % intervals between runs." in said
    assert bench("show", out, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert [each["seed"] for each in shown["experiment"]["runs"]] == [0, 0, 1, 1]
    rates = shown["quantities"]["metrics.output_tokens_per_s.whole_run"]
    assert rates["sdpa"]["low"] <= rates["sdpa"]["value"] <= rates["sdpa"]["high"]
    assert len(rates["torch"]["values"]) == 2


def test_arms_are_compared_by_name_and_form(
    made: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = made
    assert bench("compare", out, "--baseline", "sdpa", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["runs"] == ["sdpa", "torch"] and found["n"] == {"sdpa": 2, "torch": 2}
    rate = next(each for each in found["metrics"] if each["metric"] == "Output tok/s, whole run")
    assert rate["torch / sdpa low"] < rate["torch / sdpa"] < rate["torch / sdpa high"]
    assert bench("compare", out, "--csv") == 0
    assert '"sdpa, run 2",metrics.ttft_s.mean,s,' in capsys.readouterr().out
    assert bench("compare", out, "--markdown") == 0
    assert "\n| Metric | torch | sdpa | sdpa / torch | Better |\n" in capsys.readouterr().out
    assert bench("compare", out, "--baseline", "nope") == 2
    assert "'torch', 'sdpa'" in capsys.readouterr().err


def test_two_of_its_runs_alone_get_no_verdict(
    made: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    pair = made[0] / "1-torch", made[0] / "2-sdpa"
    assert bench("compare", *pair) == 0
    said = capsys.readouterr().out
    assert said.startswith("One run each: no verdict.\nA verdict takes repeats: bench run ")
    assert "--backend torch,sdpa --repeat 8" in said
    assert " better" not in said and " worse" not in said
    assert bench("compare", *pair, "--fail-if", "output_tokens_per_s_whole_run<0.0001") == 4
    assert bench("compare", made[0], "--fail-if", "output_tokens_per_s_whole_run<0.0001") == 0
    assert bench("compare", made[0], "--fail-if", "memory_weights>1") == 2


def test_draws_of_two_seeds_do_not_compare(made: tuple[Path, str]) -> None:
    assert bench("compare", made[0] / "1-torch", made[0] / "3-sdpa") == 4


def test_it_is_loaded_as_one(made: tuple[Path, str]) -> None:
    loaded = backbench.load(made[0])
    assert isinstance(loaded, LoadedExperiment)
    assert [run.path.name for run in loaded.runs] == ["1-torch", "2-sdpa", "3-sdpa", "4-torch"]
    assert list(loaded.values["arm"]) == ["torch", "torch", "sdpa", "sdpa"]
    assert (loaded.values["metrics.output_tokens_per_s.whole_run"] > 0).all()
    table = backbench.compare([made[0]]).set_index("metric")
    assert table.loc["Output tok/s, whole run", "sdpa / torch"] > 0


def test_its_report_is_of_its_arms(made: tuple[Path, str], tmp_path: Path) -> None:
    assert bench("report", made[0], "-o", tmp_path / "page.html") == 0
    page = (tmp_path / "page.html").read_text()
    assert page == (made[0] / "report.html").read_text()
    assert page.count("n = 2 runs") == 2 and "Runs of each arm" in page
    assert "intervals between runs" in page


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda data: data["runs"][0].update(seed=9), "1-torch: its seed is 0, the experiment lists 9"),
        (
            lambda data: data["runs"][1].update(block=1) or data["runs"][2].update(block=0),
            "the same requests",
        ),
        (lambda data: data["runs"][0].update(path="2-sdpa"), "2-sdpa: its uuid"),
        (lambda data: data["runs"][0].update(path="5-gone"), "5-gone"),
    ],
)
def test_a_list_that_does_not_hold_is_found(
    made: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], edit: object, said: str
) -> None:
    out = shutil.copytree(made[0], tmp_path / "x")
    data = json.loads((out / "experiment.json").read_text())
    edit(data)  # type: ignore[operator]
    (out / "experiment.json").write_text(json.dumps(data))
    assert bench("verify", out) == 4
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"schema_version": 2}',
        '{"schema_version": 1}',
        '{"schema_version": 1, "arms": ["a"], "blocks": 1, "command": "", "runs": []}',
        '{"schema_version": 1, "arms": ["a"], "blocks": 1, "command": "", "runs": '
        '[{"path": "../up", "arm": "a", "block": 0, "seed": 0, "uuid": "u"}]}',
    ],
)
def test_what_is_no_experiment_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    (tmp_path / "experiment.json").write_text(content)
    for command in (
        ["show", tmp_path],
        ["compare", tmp_path],
        ["report", tmp_path, "-o", tmp_path / "p.html"],
    ):
        assert bench(*command) in (2, 4)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and len(line) < 300 and "experiment" in line
