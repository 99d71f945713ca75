"""The recipes of docs/ci.md, executed: every shell line of every job, in bash, with made-up runs.

`bench` is this checkout's command with a runner that runs nothing, `python -m pip` does nothing, and the
repository has two commits; all else (options, files, exit codes, steps that always run) is as printed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from backbench.harness.gate.policy import read_policy

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
BENCH = f"""#!{sys.executable} -P
import os, sys
sys.path[:0] = [{str(ROOT)!r}, *({str(ROOT / "tests")!r} + each for each in ("", "/reports", "/harness"))]
from gate.conftest import FakeRunner
from backbench.harness.gate import arms, kernels
from test_ci_recipes import turns
slower = float(os.environ.get("SLOWER", "0"))
arms.run_in_process = FakeRunner(loss=slower, noise=float(os.environ.get("NOISE", "0.001")))
kernels.InProcesses.__call__ = turns(slower)
from backbench.harness.cli import main
main()
"""
PYTHON = f"""#!/bin/bash
[ "$1 $2" = "-m pip" ] && exit 0
exec {sys.executable} "$@"
"""


def turns(slower: float) -> Any:
    """Turns of one made-up kernel, in place of processes."""
    from gate.test_gate_kernels import MadeUp

    made = MadeUp(loss=slower)
    return lambda _, order: made(order)


def jobs() -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, job) of each recipe; GitLab's is the one with a script."""
    for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL):
        found = yaml.safe_load(text)
        yield from (
            ((f"{found['name']}", job) for job in found["jobs"].values())
            if "jobs" in found
            else (("gitlab", job) for job in found.values())
        )


JOBS = dict(jobs())


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def runner(tmp_path: Path) -> dict[str, str]:
    """A checkout with the page's policies, and the environment of its steps."""
    checkout = tmp_path / "checkout"
    (checkout / "backbench").mkdir(parents=True)
    (checkout / "ci").mkdir()
    (checkout / ".gitignore").write_text("gate*/\n")
    policies = re.findall(r"```toml\n# (\S+)\n(.*?)```", PAGE, re.DOTALL)
    for name, text in policies:
        (checkout / name).write_text(text)
    (checkout / "ci" / "gate-gpu.toml").write_text('workload = "synthetic"\n')
    commits = []
    git(checkout, "init", "-q", "-b", "main")
    for version in ("one", "two"):
        (checkout / "backbench" / "__init__.py").write_text(f"# {version}\n")
        git(checkout, "add", ".")
        git(checkout, "commit", "-qm", version)
        commits.append(git(checkout, "rev-parse", "HEAD"))
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("bench", BENCH), ("python", PYTHON), ("activate", "")):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    history = tmp_path / "history"
    history.mkdir()
    (history / "release.sha").write_text(commits[0] + "\n")
    return os.environ | {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "HERE": str(checkout),
        "BASE": commits[0],
        "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md"),
        "CI_MERGE_REQUEST_DIFF_BASE_SHA": commits[0],
        "BACKBENCH_VENV": str(tmp_path),
        "BACKBENCH_HISTORY": str(history),
    }


def shell(script: str, runner: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """As GitHub and GitLab do: bash that ends at the first failure."""
    script = script.replace("${{ github.event.pull_request.base.sha }}", runner["BASE"])
    assert "${{" not in script, "an expression that this test does not know"
    command = ["bash", "-e", "-o", "pipefail", "-c", script]
    return subprocess.run(
        command, cwd=runner["HERE"], env=runner, capture_output=True, text=True, check=False, timeout=120
    )


def run(job: dict[str, Any], runner: dict[str, str]) -> tuple[int, str]:
    """The job's exit code, and what its failing step said."""
    code, said = 0, ""
    for step in job.get("steps", [{"run": "\n".join(job.get("script", []))}]):
        if "run" not in step or (code and step.get("if") != "always()"):
            continue
        done = shell(step["run"], runner)
        if done.returncode:
            code, said = code or done.returncode, said or done.stderr
    return code, said


def kept(job: dict[str, Any]) -> list[str]:
    """Files that the job hands on."""
    if "script" in job:
        return [*job["artifacts"]["paths"], job["artifacts"]["reports"]["junit"]]
    return [
        path
        for step in job["steps"]
        if "upload-artifact" in step.get("uses", "")
        for path in step["with"]["path"].split()
    ]


def test_the_page_has_the_recipes_that_it_promises() -> None:
    assert JOBS.keys() == {"gate", "gate-gpu", "nightly", "gitlab"}
    assert JOBS["gate-gpu"]["strategy"]["matrix"]["runner"] == ["nvidia", "amd"]


@pytest.mark.parametrize("name", ["gate", "gate-gpu", "gitlab"])
def test_a_job_passes_equal_code_and_keeps_its_files(name: str, runner: dict[str, str]) -> None:
    (Path(runner["BACKBENCH_VENV"]) / "bench-calibration.json").write_text(
        '{"schema_version": 1, "cells": []}'
    )
    code, said = run(JOBS[name], runner)
    assert code == 0, said
    assert all((Path(runner["HERE"]) / path).is_file() for path in kept(JOBS[name]))
    if name != "gitlab":
        assert "**PASS: throughput" in Path(runner["GITHUB_STEP_SUMMARY"]).read_text()


@pytest.mark.parametrize("name", ["gate", "gitlab"])
def test_a_job_fails_slower_code_and_still_shows_why(name: str, runner: dict[str, str]) -> None:
    runner["SLOWER"] = "0.2"
    code, said = run(JOBS[name], runner)
    assert code == 1 and "REGRESSED: " in said
    if name == "gate":
        assert "REGRESSED: " in Path(runner["GITHUB_STEP_SUMMARY"]).read_text()


@pytest.mark.slow
def test_an_inconclusive_gate_is_green_on_github_and_a_warning_on_gitlab(runner: dict[str, str]) -> None:
    runner["NOISE"] = "0.4"
    code, said = run(JOBS["gate"], runner)
    assert code == 0, said
    assert "INCONCLUSIVE" in Path(runner["GITHUB_STEP_SUMMARY"]).read_text()
    shutil.rmtree(Path(runner["HERE"]) / "gate")
    assert run(JOBS["gitlab"], runner)[0] in JOBS["gitlab"]["allow_failure"]["exit_codes"] == [3]


@pytest.mark.slow
@pytest.mark.parametrize(("slower", "exit_code", "gates"), [("0", 0, 1), ("0.2", 1, 2)])
def test_the_night_judges_by_pairs_where_stored_runs_look_better(
    runner: dict[str, str], slower: str, exit_code: int, gates: int
) -> None:
    from gate.test_gate_stored import experiment

    history = Path(runner["BACKBENCH_HISTORY"])
    experiment(history / "release")
    runner["SLOWER"] = slower
    code, said = run(JOBS["nightly"], runner)
    assert code == exit_code, said
    assert len(list(history.rglob("gate.json"))) == gates
    shown = Path(runner["GITHUB_STEP_SUMMARY"]).read_text()
    assert shown.startswith("| when | gate |") and ("| regressed |" in shown) == (gates == 2)


def test_the_pages_policies_are_policies(tmp_path: Path) -> None:
    blocks = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 2
    for text in blocks:
        (tmp_path / "policy.toml").write_text(text)
        read_policy(tmp_path / "policy.toml")
        assert tomllib.loads(text)


@pytest.mark.slow
def test_the_pytest_recipe_is_a_test(runner: dict[str, str], tmp_path: Path) -> None:
    """Its command, with `bench` in place of the module."""
    (text,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    git(Path(runner["HERE"]), "update-ref", "refs/remotes/origin/main", runner["BASE"])
    bench = str(Path(runner["PATH"].split(os.pathsep)[0]) / "bench")
    text = text.replace('sys.executable, "-m", "backbench"', repr(bench))
    assert repr(bench) in text
    for slower, passes in (("0", True), ("0.2", False)):
        file = tmp_path / f"test_recipe_{passes}.py"
        file.write_text(text)
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
            cwd=runner["HERE"],
            env=runner | {"SLOWER": slower},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode == 0) == passes, done.stdout
        assert passes or "REGRESSED" in done.stdout
