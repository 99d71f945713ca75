"""Tampered, truncated, older and future: a run, an experiment and a bundle each get the right one line."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest

from backbench.errors import INVALID
from backbench.harness.cli import run_command
from backbench.reports.pack import pack
from backbench.reports.record import RunDirectory, sign
from backbench.reports.record.experiment import Experiment, Listed

OLD = Path(__file__).parent / "fixtures" / "schema-1"


def bench(*arguments: str) -> int:
    """The exit code of a command, however it ends."""
    try:
        return run_command(list(arguments))
    except SystemExit as end:
        return int(end.code or 0)


def make_run(folder: Path) -> Path:
    return Path(shutil.copytree(OLD / "torch", folder / "run"))


def make_experiment(folder: Path) -> Path:
    """Two arms of one run each."""
    listed = []
    for number, arm in enumerate(("torch", "sdpa"), 1):
        directory = RunDirectory(shutil.copytree(OLD / arm, folder / "experiment" / str(number)))
        record = directory.read_record()
        listed.append(Listed(str(number), arm, 0, 0, record.run["uuid"]))
    Experiment(folder / "experiment", ("torch", "sdpa"), 1, "bench run", tuple(listed)).write()
    return folder / "experiment"


def make_bundle(folder: Path) -> Path:
    pack([OLD / "torch"], folder / "bundle.zip")
    return folder / "bundle.zip"


def edit(path: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    """Change a file of a directory, or of a bundle together with its digest there."""
    if path.suffix != ".zip":
        (path / name).write_bytes(change((path / name).read_bytes()))
        return
    with ZipFile(path) as archive:
        files = {each: archive.read(each) for each in archive.namelist()}
    files[name] = change(files[name])
    if name != "bundle.json":
        manifest = json.loads(files["bundle.json"])
        manifest["files"][name] = hashlib.sha256(files[name]).hexdigest()
        files["bundle.json"] = json.dumps(manifest).encode()
    with ZipFile(path, "w") as archive:
        for each, content in files.items():
            archive.writestr(each, content)


def with_version(version: object) -> Callable[[bytes], bytes]:
    return lambda content: json.dumps(json.loads(content) | {"schema_version": version}).encode()


def faster(content: bytes) -> bytes:
    data = json.loads(content)
    data["metrics"]["output_tokens_per_s"]["whole_run"] = 9999.0
    return json.dumps(data).encode()


KINDS: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "run": (make_run, "run.json", "run.json"),
    "experiment": (make_experiment, "experiment.json", "2/run.json"),
    "bundle": (make_bundle, "bundle.json", "run-1/run.json"),
}
"""What is made, the file that says what it is, and a record in it."""


@pytest.fixture(params=KINDS)
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str, str]:
    make, head, record = KINDS[request.param]
    return make(tmp_path), head, record


def refused(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of the commands that read, which is the same for all."""
    lines = set()
    commands: list[list[str]] = [["show"], ["verify"], ["compare", "--anyway", str(OLD / "sdpa")]]
    commands += [["report", "-o", str(path.parent / "page.html")]]
    for name, *rest in commands:
        capsys.readouterr()
        assert bench(name, str(path), *rest) == 2
        told = capsys.readouterr()
        assert told.out == ""
        (line,) = told.err.splitlines()
        assert len(line) < 300
        lines.add(line)
    (line,) = lines
    return line


@pytest.mark.parametrize("where", ["head", "record"])
@pytest.mark.parametrize(
    ("version", "said"),
    [
        (99, "has schema_version 99, of a newer Backbench; this Backbench reads"),
        (0, "has schema_version 0, but this Backbench reads"),
        (None, "has schema_version None, but this Backbench reads"),
    ],
)
def test_other_versions(
    stored: tuple[Path, str, str],
    capsys: pytest.CaptureFixture[str],
    version: object,
    said: str,
    where: str,
) -> None:
    path, head, record = stored
    name = head if where == "head" else record
    edit(path, name, with_version(version))
    if where == "record" and head == "experiment.json":
        assert bench("verify", str(path)) == INVALID  # the other runs are still checked
        assert said in capsys.readouterr().err
        assert bench("show", str(path)) == 2
        assert f"{path}/{name} {said}" in capsys.readouterr().err
        return
    line = refused(path, capsys)
    assert f"{path}/{name} {said}" in line
    assert ("Update it" in line) == (version == 99)


def test_truncated(stored: tuple[Path, str, str], capsys: pytest.CaptureFixture[str]) -> None:
    path, head, _ = stored
    if path.suffix == ".zip":
        path.write_bytes(path.read_bytes()[:-200])
        assert "is no whole zip file" in refused(path, capsys)
        return
    edit(path, head, lambda content: content[: len(content) // 2])
    line = refused(path, capsys)
    assert head in line and "restore it" in line.lower()


def test_tampered(stored: tuple[Path, str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """Where the container has no digest of its own, or its digest was written anew: the record's says it."""
    path, _, record = stored
    edit(path, record, faster)
    assert bench("show", str(path)) == 0
    where = path / record.removesuffix("run.json").rstrip("/")
    assert f"tampered: {where}: run.json was edited after the run" in capsys.readouterr().err
    assert bench("verify", str(path)) == INVALID
    assert "metrics.output_tokens_per_s.whole_run is 9999.0" in capsys.readouterr().err


def test_tampered_and_signed_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_run(tmp_path)
    edit(path, "run.json", faster)
    directory = RunDirectory.open(path)
    directory.write_record(sign(directory, directory.read_record()))
    assert bench("show", str(path)) == 0 and "tampered" not in capsys.readouterr().err
    assert bench("verify", str(path)) == INVALID


def test_an_experiment_that_lists_another_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_experiment(tmp_path)
    directory = RunDirectory.open(path / "2")
    record = directory.read_record()
    changed: dict[str, Any] = record.run | {"uuid": "another"}
    directory.write_record(sign(directory, replace(record, run=changed)))
    assert bench("verify", str(path)) == INVALID
    assert "2: its uuid is 'another'" in capsys.readouterr().err


def test_an_older_record_is_read_packed_and_read_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Schema 1 is migrated as it is read: columns that were added later say what their lack meant."""
    bundle = make_bundle(tmp_path)
    directory = RunDirectory.open(bundle)
    assert directory.read_record().schema_version == 1
    assert not directory.read_requests()["warmup"].any()
    assert directory.read_telemetry()["process_cpu_s"].isna().all()
    assert bench("verify", str(bundle)) == 0
    assert "of an older definition (metric schema 1)" in capsys.readouterr().out
