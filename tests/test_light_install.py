"""Without the engine's packages whatever reads stored runs works, and what runs says what to install."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from backbench.errors import HarnessError
from backbench.harness.cli import COMMANDS
from backbench.harness.faults import ENGINE_MODULES
from backbench.harness.options import run_options
from backbench.harness.subjects.url.calibration import null_server
from backbench.harness.subjects.url.null_server import Script
from backbench.harness.subjects.url.subject import UrlSubject

ROOT = Path(__file__).parents[1]
OLD = ROOT / "tests" / "reports" / "fixtures" / "schema-1"

LIGHT = """
import contextlib, io, json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MODULES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

MODULES = sys.argv[1].split(",")
sys.meta_path.insert(0, Absent())
from backbench.harness.cli import run_command
found = []
for arguments in json.loads(sys.argv[2]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = run_command(arguments)
        except SystemExit as end:
            code = end.code or 0
    found.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(found))
"""


def light(commands: list[list[str]], cwd: Path) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each command in one process that cannot import the engine's packages."""
    arguments = [sys.executable, "-c", LIGHT, ",".join(ENGINE_MODULES), json.dumps(commands)]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=cwd, check=False)
    assert done.returncode == 0, done.stderr
    return [tuple(each) for each in json.loads(done.stdout)]


def test_stored_runs_are_read_without_the_engine(tmp_path: Path) -> None:
    run, other = str(OLD / "torch"), str(OLD / "sdpa")
    formats = ("bencher", "github-action-benchmark", "pytest-benchmark", "vllm")
    commands = [
        ["show", run],
        ["verify", run],
        ["compare", run, other],
        ["report", run, other, "-o", "page.html"],
        ["pack", run, other, "-o", "bundle.zip"],
        ["verify", "bundle.zip"],
        ["compare", "bundle.zip"],
        *(["export", run, "--format", name, "-o", f"{name}.json"] for name in formats),
        ["schema"],
        ["list", str(OLD)],
        ["workloads"],
        ["models"],
    ]
    for arguments, (code, out, err) in zip(commands, light(commands, tmp_path), strict=True):
        assert (code, err) == (0, ""), (arguments, err)
        assert out


def test_every_commands_help_needs_no_engine(tmp_path: Path) -> None:
    commands = [[name, "--help"] for name in COMMANDS]
    for arguments, (code, out, err) in zip(commands, light(commands, tmp_path), strict=True):
        assert (code, err) == (0, ""), (arguments, err)
        assert "Usage: bench" in out


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "--workload", "synthetic", "--backend", "torch"],
        ["kernels", "--backend", "torch", "--shapes", "4q1s64"],
        ["env"],
        ["backends"],
        ["portability"],
    ],
)
def test_what_runs_says_what_to_install(tmp_path: Path, arguments: list[str]) -> None:
    ((code, out, err),) = light([arguments], tmp_path)
    assert (code, out) == (2, "")
    (line,) = [each for each in err.splitlines() if each.startswith("error: ")]
    assert "python -m pip install 'backbench[engine]'" in line and len(line) < 300
    assert "Traceback" not in err
    assert not list(tmp_path.rglob("*"))  # nothing half-done is left


def test_a_server_is_measured_without_the_engine(tmp_path: Path) -> None:
    with null_server(Script(ttft_s=0.01, itl_s=0.001)) as address:
        arguments = [
            "run",
            "-w",
            "synthetic",
            "--url",
            address,
            "--input-lengths",
            "fixed:8",
            "-n",
            "6",
            "-q",
        ]
        arguments += ["--output-lengths", "fixed:4", "--concurrency", "2", "--no-calibrate-client"]
        ((code, out, err),) = light([arguments], tmp_path)
    assert code == 0, err
    assert "synthetic on null (unknown), Backbench's null server" in out
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "report.html").exists()


def test_without_the_clients_package_a_run_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    options = run_options({"workload": "synthetic", "url": "http://127.0.0.1:9/v1"})
    with pytest.raises(HarnessError, match=r"python -m pip install 'backbench\[client\]'") as caught:
        UrlSubject(options)
    assert len(str(caught.value)) < 300


def required(extra: str, declared: dict[str, list[str]]) -> set[str]:
    """The distributions that an extra of ours brings, those of the extras it names too."""
    found = set()
    for each in declared[extra]:
        name = re.split(r"[\s>=;\[]", each)[0]
        inner = re.search(r"\[([\w,]+)\]", each)
        if name == "backbench" and inner:
            found |= {part for one in inner.group(1).split(",") for part in required(one, declared)}
        else:
            found.add(name)
    return found


def test_the_engines_modules_are_those_of_the_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    engine = required("engine", extras)
    provided = importlib.metadata.packages_distributions()
    assert {name for module in ENGINE_MODULES for name in provided.get(module, [])} == engine
    assert engine <= required("test", extras) and engine <= required("flash", extras)
    light = {re.split(r"[\s>=;\[]", each)[0] for each in project["dependencies"]}
    assert not light & engine
    assert required("engine", extras) - required("rocm", extras) == {"triton", "nvidia-ml-py"}
