"""The page that tells how to add a backend: its code is installed and run as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "adding-a-backend.md"
BLOCK = re.compile(r"^```\w+ file=(\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def files() -> dict[str, str]:
    return {match[1]: match[2] for match in BLOCK.finditer(PAGE.read_text())}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's package, installed by pip without the network into a folder of its own."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name, text in files().items():
        (source / name).write_text(text)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    command += ["--no-build-isolation", "--target", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


def bench(installed: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from backbench.harness.cli import main; main()", *arguments]
    path = os.pathsep.join((str(installed), str(ROOT)))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)


def test_the_backend_is_under_80_lines() -> None:
    code = [line for line in files()["backbench_online.py"].splitlines() if line.strip()]
    assert len(code) < 80


def test_it_is_found_and_passes_every_check(installed: Path) -> None:
    done = bench(installed, "backends", "--check", "online")
    assert done.returncode == 0, done.stdout + done.stderr
    verdict = done.stdout.splitlines()[0]
    assert verdict.startswith("online on ") and "wrong" not in verdict
    assert "served by torch" in done.stdout


def test_it_is_listed_beside_the_built_in_ones(installed: Path) -> None:
    done = bench(installed, "backends", "--json")
    assert done.returncode == 0, done.stderr
    assert '"name": "online"' in done.stdout and '"name": "torch"' in done.stdout


def test_the_file_alone_serves_too(tmp_path: Path) -> None:
    file, out = tmp_path / "backbench_online.py", tmp_path / "run"
    file.write_text(files()["backbench_online.py"])
    run = ["run", "--workload", "batch:2x8+2", "--model", "tiny", "--backend", str(file), "--out", str(out)]
    done = bench(tmp_path, *run)
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"attention": "online"' in (out / "run.json").read_text()
