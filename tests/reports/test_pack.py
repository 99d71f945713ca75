"""A packed run holds no name of its machine or owner, the same numbers, and verifies."""

from __future__ import annotations

import json
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest

import backbench
from backbench.errors import INVALID, ReportError
from backbench.harness.cli import run_command
from backbench.harness.memory import Readings
from backbench.harness.recording import Known, Measured, numbers, tabulate, write, write_tables
from backbench.harness.replay import mode_of, replay
from backbench.reports.loaded import LoadedBundle, LoadedExperiment, LoadedRun
from backbench.reports.pack import pack
from backbench.reports.record import RunDirectory, sign
from backbench.reports.record.experiment import Experiment, Listed
from backbench.reports.verify import examine_stored, verify

OLD = Path(__file__).parent / "fixtures" / "schema-1"
RUNS = [OLD / "torch", OLD / "sdpa"]

SECRETS = (
    "node17",
    "lovelace",
    "evangeline",
    "/data",
    "/opt",
    "wolperdinger",
    "12345678-1234-1234",
    "1652922012345",
    "SN-0042",
    "10.20.30.40",
    "example.org",
    "bucket-of-evangeline",
    "Zebra",
    "zebra",
    "chat-of-bob",
    "my data",
)


def bench(*arguments: str) -> int:
    """The exit code of a command, however it ends."""
    try:
        return run_command(list(arguments))
    except SystemExit as end:
        return int(end.code or 0)


@pytest.fixture
def run_of_eve(
    tmp_path: Path, make_target: Any, make_workload: Any, clock: Any, monkeypatch: pytest.MonkeyPatch
) -> RunDirectory:
    """A run that verifies and names its machine and its owner wherever a text can stand."""
    monkeypatch.setattr(socket, "gethostname", lambda: "node17")
    monkeypatch.setenv("USER", "lovelace")
    workload = make_workload([2, 1, 1])
    done = replay(make_target({0: [(5, 1), (9, 1)], 1: [("error", 1)], 2: [(7, 1)]}), workload, clock=clock)
    known = Known(
        run={
            "uuid": "00000000-0000-4000-8000-000000000001",
            "utc": "2026-01-01T00:00:00+00:00",
            "command": "bench run --backend /opt/evangeline/k.py --out '/data/my data/x' --max-seqs 8",
            "asked": {"out": "/data/my data/x", "workload": "~/traces/evangeline.csv", "max_seqs": 8},
            "error": "OSError: cannot read /data/my data/x on node17 as lovelace",
            "seed": 0,
        },
        workload={
            "name": "scripted",
            "content_hash": "",
            "notes": ["from s3://bucket-of-evangeline/t and 10.20.30.40", "Zebra's own traffic at 20 tok/s"],
            "parameters": {"file": "C:\\wolperdinger\\t.csv"},
        },
        model={"name": "/data/wolperdinger/m", "dtype": "float32"},
        engine={"block_size": 16},
        backend={
            "asked": "/opt/evangeline/k.py",
            "used": {"attention": "k"},
            "passed_over": {"/opt/evangeline/k.py": ["zebra is slow"], "/opt/evangeline/j.py": ["no"]},
        },
        system={
            "device": {"vendor": "cpu", "name": "c", "arch": "a", "serial": 1652922012345},
            "hostname": "n",
            "note": "mail evangeline@example.org, serial number SN-0042",
            "card": "GPU-12345678-1234-1234-1234-123456789abc",
        },
        software={"packages": {"x": "1.2.3.4"}, "environment": {"LD_PRELOAD": "/opt/a.so:/opt/b.so"}},
        warmup={"seconds": 0.0, "requests": 0},
        context={
            "mode": mode_of(workload),
            "batch_limit": 8,
            "concurrency": workload.concurrency,
            "gpus": 0,
            "slo_s": {},
            "ideal_prefix_hit_ratio": None,
            "shape": None,
            "peaks": {},
        },
        memory={"weights_bytes": 100, "kv_pool_bytes": 300},
    )
    measured = Measured(known, done, [], [], ["no sensor in /opt/sensors"], Readings(weights_bytes=100))
    tables = tabulate(measured)
    directory = RunDirectory.create(tmp_path / "run")
    write_tables(directory, tables)
    write(directory, numbers(tables), tables)
    frame = directory.read_requests()
    frame["session"] = ["chat-of-bob", "chat-of-evangeline", "chat-of-bob"]
    frame.loc[1, "error"] = "RuntimeError: no /data/my data/x on 10.20.30.40"
    directory.write_requests(frame)
    directory.write_record(sign(directory, directory.read_record()))
    assert verify(directory) == []
    return directory


def plain_text(bundle: Path) -> str:
    """Everything in a bundle as text, the Parquet files decoded."""
    with ZipFile(bundle) as archive:
        texts = [archive.read(name).decode("latin-1") for name in archive.namelist()]
    runs = [path for path in (bundle / "run-1", bundle / "experiment-1" / "1") if (bundle / path)]
    for path in runs:
        try:
            texts.append(RunDirectory.open(path).read_requests().to_csv())
        except ReportError:
            continue
    return "\n".join(texts)


def measured_numbers(value: Any, path: str = "") -> dict[str, Any]:
    """Every number of a record's section by its dotted name."""
    if isinstance(value, dict):
        return {
            k: v for key, each in value.items() for k, v in measured_numbers(each, f"{path}.{key}").items()
        }
    return {path: value} if isinstance(value, int | float) else {}


def test_planted_secrets_are_gone_and_the_run_verifies(run_of_eve: RunDirectory, tmp_path: Path) -> None:
    out = tmp_path / "bundle.zip"
    before = run_of_eve.read_record()
    told = json.dumps(before.to_json()) + run_of_eve.read_requests().to_csv()
    assert all(secret in told for secret in SECRETS if secret not in ("12345678-1234-1234",))
    packed = pack([run_of_eve.path], out, ["zebra"])
    found = plain_text(out)
    assert [secret for secret in SECRETS if secret in found] == []
    assert examine_stored(out).problems == ()
    record = RunDirectory.open(out).read_record()
    assert record.run["redacted"] == sorted(packed.entries["run-1"])
    for name in ("run.command", "model.name", "system.device.serial", "requests.error", "requests.session"):
        assert name in record.run["redacted"]
    assert record.run["uuid"] == before.run["uuid"]
    assert record.run["command"] == "bench run --backend '<path>' --out '<path>' --max-seqs 8"
    assert record.software["packages"] == {"x": "1.2.3.4"}
    assert record.backend["passed_over"] == {"<path>": ["no"], "<path> 2": ["<redacted> is slow"]}


def test_no_measured_number_changes(run_of_eve: RunDirectory, tmp_path: Path) -> None:
    out = tmp_path / "bundle.zip"
    pack([run_of_eve.path], out)
    before, after = run_of_eve.read_record(), RunDirectory.open(out).read_record()
    for name in ("metrics", "memory", "energy", "schedule", "correctness", "roofline", "warmup", "engine"):
        assert measured_numbers(getattr(before, name)) == measured_numbers(getattr(after, name)), name
    old, new = run_of_eve.read_requests(), RunDirectory.open(out).read_requests()
    assert new["session"].tolist() == ["session-1", "session-2", "session-1"]
    texts = ["session", "error"]
    assert old.drop(columns=texts).to_json() == new.drop(columns=texts).to_json()
    for name in ("steps.parquet", "telemetry.parquet"):
        with ZipFile(out) as archive:
            assert archive.read(f"run-1/{name}") == (run_of_eve.path / name).read_bytes()


def test_nothing_of_a_harmless_run_is_touched(tmp_path: Path) -> None:
    packed = pack([OLD / "torch"], tmp_path / "a.zip")
    assert packed.entries == {"run-1": []}
    before, after = RunDirectory.open(OLD / "torch").read_record(), backbench.load(tmp_path / "a.zip")
    assert isinstance(after, LoadedRun)
    assert replace(after.record, run=before.run) == before
    assert after.record.run["redacted"] == []


def test_the_same_runs_are_the_same_bytes_and_a_bundle_can_be_packed_again(tmp_path: Path) -> None:
    for name in ("a.zip", "b.zip"):
        pack(RUNS, tmp_path / name)
    pack([tmp_path / "a.zip"], tmp_path / "c.zip")
    contents = {(tmp_path / name).read_bytes() for name in ("a.zip", "b.zip", "c.zip")}
    assert len(contents) == 1


def test_every_reading_command_takes_a_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, page = str(tmp_path / "b.zip"), tmp_path / "page.html"
    assert bench("pack", *map(str, RUNS), "-o", bundle) == 0
    assert "run-2: redacted nothing" in capsys.readouterr().out
    for arguments in (
        ["show", bundle],
        ["show", bundle, "--json"],
        ["verify", bundle],
        ["compare", bundle],
        ["compare", f"{bundle}/run-1", str(OLD / "sdpa")],
        ["report", bundle, "-o", str(page)],
    ):
        assert bench(*arguments) == 0, arguments
        told = capsys.readouterr()
        assert "tampered" not in told.err
        if arguments[0] in ("show", "compare") and "--json" not in arguments:
            assert "529 tok/s" in told.out
        if "--json" in arguments:
            assert [each["backend"]["asked"] for each in json.loads(told.out)] == ["torch", "sdpa"]
    assert "529 tok/s" in page.read_text()


def test_a_bundle_loads(tmp_path: Path) -> None:
    pack(RUNS, tmp_path / "b.zip")
    loaded = backbench.load(tmp_path / "b.zip")
    assert isinstance(loaded, LoadedBundle)
    first = loaded.entries["run-1"]
    assert isinstance(first, LoadedRun) and len(first.requests) == 24 and first.problems == ()
    assert len(backbench.compare([loaded])) == len(backbench.compare(RUNS))
    with pytest.raises(ReportError, match="holds 2 runs"):
        RunDirectory.open(tmp_path / "b.zip")


def test_an_experiment_stays_one_under_names_that_say_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "node17-experiment"
    arms = ("/opt/evangeline/a.py", "/opt/evangeline/b.py")
    runs = []
    for number, arm in enumerate(arms):
        directory = RunDirectory(shutil.copytree(OLD / "torch", path / f"evangeline-{number}"))
        record = directory.read_record()
        record = replace(record, run=record.run | {"uuid": str(number)})
        directory.write_record(sign(directory, record))
        runs.append(Listed(f"evangeline-{number}", arm, 0, 0, str(number)))
    Experiment(path, arms, 1, "bench run -b /opt/evangeline/a.py --out /data/x", tuple(runs)).write()
    packed = pack([path], tmp_path / "b.zip")
    assert {"experiment.arms", "experiment.command"} <= {*packed.entries["experiment-1"]}
    assert "evangeline" not in plain_text(tmp_path / "b.zip")
    loaded = backbench.load(tmp_path / "b.zip")
    assert isinstance(loaded, LoadedExperiment)
    assert list(loaded.arms) == ["<path>", "<path> 2"]
    assert examine_stored(tmp_path / "b.zip").problems == ()
    for command in (["show"], ["show", "--json"], ["verify"], ["compare"], ["report", "-o"]):
        page = [str(tmp_path / "page.html")] if command[0] == "report" else []
        assert bench(*command, *page, str(tmp_path / "b.zip")) == 0, command
    assert "<path> 2" in capsys.readouterr().out


def test_what_does_not_verify_is_not_packed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = shutil.copytree(OLD / "torch", tmp_path / "run")
    data = json.loads((run / "run.json").read_text())
    data["metrics"]["output_tokens_per_s"]["whole_run"] = 9999.0
    (run / "run.json").write_text(json.dumps(data))
    assert bench("pack", str(run), "-o", str(tmp_path / "b.zip")) == INVALID
    assert not (tmp_path / "b.zip").exists()
    assert "does not verify" in capsys.readouterr().err
    directory = RunDirectory.open(run)  # signed by whoever edited it: the numbers still do not follow
    directory.write_record(sign(directory, directory.read_record()))
    assert bench("pack", str(run), "-o", str(tmp_path / "b.zip")) == INVALID


@pytest.mark.parametrize("name", ["b.tar", "taken.zip", "nowhere/b.zip"])
def test_a_bundle_that_cannot_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "taken.zip").write_text("mine")
    assert bench("pack", str(OLD / "torch"), "-o", str(tmp_path / name)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert len(line) < 300
    assert (tmp_path / "taken.zip").read_text() == "mine"
    assert [each.name for each in tmp_path.iterdir()] == ["taken.zip"]
