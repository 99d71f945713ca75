"""`bench run` end to end on the bundled model, with the engine and no scripted part."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from backbench.harness.run_log import LOG_FILE
from backbench.reports.metrics import validity
from backbench.reports.record import RunDirectory
from backbench.reports.verify import verify

RUNS = ("1-torch", "2-torch (2)")
BENCH = "import sys; from backbench.harness.cli import main; main(sys.argv[1:])"

ANNOUNCED = (
    "import backbench.harness.experiment as experiment\n"
    "replay = experiment.replay\n"
    "def announced(*arguments, **options):\n"
    "    print('replaying', flush=True)\n"
    "    return replay(*arguments, **options)\n"
    "experiment.replay = announced\n" + BENCH
)
"""Says when the replay begins, so that Ctrl-C comes in its middle."""


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BENCH, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=quiet(), timeout=240)


def quiet() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A backend against itself: two runs of eight short requests, four in flight."""
    out = tmp_path_factory.mktemp("series") / "runs"
    done = bench(
        *("run", "-w", "synthetic", "--input-lengths", "uniform:4:40", "--output-lengths", "uniform:4:12"),
        *("--backend", "torch,torch", "-n", 8, "--concurrency", 4, "--warmup", 2),
        *("--max-step-tokens", 64, "--max-len", 256, "--slo", "ttft=100,tpot=100", "--out", out),
    )
    return out, done


def test_a_run_leaves_everything(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, done = finished
    assert done.returncode == 0, done.stderr
    assert "Output tok/s" in done.stdout
    assert str(out / "report.html") in done.stdout
    assert (out / "report.html").stat().st_size > 0
    for name in ("run.json", "requests.parquet", "steps.parquet", "telemetry.parquet"):
        assert (out / RUNS[0] / name).stat().st_size > 0


def test_the_record_is_whole_and_verifies(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    for index in RUNS:
        directory = RunDirectory.open(finished[0] / index)
        assert verify(directory) == []
        record = directory.read_record()
        assert not validity.fails(record), record.validity
        assert record.run["status"] == "complete"
        assert record.metrics["counts"]["completed"] == 8
        assert record.metrics["output_tokens"] == record.metrics["requested_tokens"]
        assert record.metrics["goodput"]["attainment"] == 1.0
        assert record.correctness["passed"] is True
        assert record.correctness["against_itself"] is True
        assert record.backend["used"] == {"attention": "torch", "linear": "torch", "operations": "torch"}
        assert record.warmup["requests"] == 2
        assert record.energy["joules_per_output_token"] is None
        assert record.energy["reasons"]


def test_mistake_05_the_second_run_starts_with_a_cold_cache(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    first, second = (RunDirectory.open(finished[0] / index).read_record() for index in RUNS)
    assert first.workload["content_hash"] == second.workload["content_hash"]
    assert second.metrics["prefix_cache"]["hit_tokens"] == first.metrics["prefix_cache"]["hit_tokens"] == 0


def test_compare_and_show(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    first, second = (finished[0] / name for name in RUNS)
    done = bench("compare", first, second)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("One run each: no verdict.")
    assert "×" in done.stdout
    assert "better" not in done.stdout and "worse" not in done.stdout
    shown = bench("show", first, "--json")
    assert json.loads(shown.stdout)["run"]["status"] == "complete"


def test_incomparable_runs_are_refused_with_the_differences(
    finished: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    first = finished[0] / RUNS[0]
    other = tmp_path / "other"
    other.mkdir()
    data = json.loads((first / "run.json").read_text())
    data["workload"]["content_hash"] = "something else"
    data["model"]["name"] = "another"
    (other / "run.json").write_text(json.dumps(data))
    done = bench("compare", first, other)
    assert done.returncode == 4
    tampered, refused = done.stderr.strip().splitlines()
    assert tampered.startswith(f"tampered: {other}")
    assert refused.startswith("error: These runs do not compare")
    assert "workload" in done.stderr
    assert "another" in done.stderr
    assert bench("compare", first, other, "--anyway").returncode == 0


def long_run(out: Path) -> list[str]:
    command = [sys.executable, "-c", ANNOUNCED, "run", "-w", "sharegpt", "-b", "torch", "-n", "400"]
    return [*command, "--concurrency", "4", "--warmup", "1", "--max-step-tokens", "256", "--out", str(out)]


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interruption_leaves_a_readable_partial_record(tmp_path: Path, sent: signal.Signals) -> None:
    out = tmp_path / "run"
    command = long_run(out)
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=quiet()
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "replaying\n"
        time.sleep(2)
        process.send_signal(sent)
        _, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    directory = RunDirectory.open(out)
    record = directory.read_record()
    assert record.run["status"] == "interrupted"
    assert any("interrupted" in reason for reason in record.validity)
    assert 0 < record.metrics["counts"]["sent"] < 400
    assert verify(directory) == []
    if sent is signal.SIGINT:
        assert bench("verify", out).returncode == 0
        assert bench("show", out).returncode == 0


@pytest.mark.slow
def test_a_terminal_that_hangs_up_leaves_a_partial_record(tmp_path: Path) -> None:
    """Closing it sends SIGHUP, and from then on nothing can be written to stdout or stderr."""
    out = tmp_path / "run"
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        long_run(out),
        stdin=subprocess.DEVNULL,
        env=quiet(),
        preexec_fn=lambda: os.login_tty(theirs),
    )
    os.close(theirs)
    try:
        seen = b""
        while b"replaying" not in seen:
            seen += os.read(ours, 4096)
        time.sleep(1)
        os.close(ours)
        assert process.wait(timeout=120) == 130, seen
    finally:
        process.kill()
    record = RunDirectory.open(out).read_record()
    assert record.run["status"] == "interrupted"


def test_ctrl_c_while_loading_exits_130_and_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "run"
    code = (
        "import sys, backbench.harness.experiment as experiment\n"
        "def stop(*_): raise KeyboardInterrupt\n"
        "experiment.make_workload = stop\n" + BENCH
    )
    command = [sys.executable, "-c", code, "run", "-w", "sharegpt", "-b", "torch", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=quiet(), timeout=120)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    assert not out.exists()


def test_a_killed_run_is_recovered(tmp_path: Path) -> None:
    """SIGKILL, which nothing can catch, in the middle of a replay."""
    out = tmp_path / "run"
    command = [sys.executable, "-c", BENCH, "run", "-w", "synthetic", "-b", "torch", "-n", "400"]
    command += ["--input-lengths", "fixed:8", "--output-lengths", "fixed:8", "--concurrency", "4"]
    command += ["--warmup", "1", "--max-len", "64", "--max-step-tokens", "64", "--out", str(out)]
    process = subprocess.Popen(
        command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, text=True, env=quiet()
    )
    try:
        log = out / LOG_FILE
        wait_until(lambda: log.exists() and log.read_text().count("end_ns") >= 4)
        refused = bench("recover", out)
        assert refused.returncode == 2 and "still going" in refused.stderr
    finally:
        process.kill()
        process.wait()
    finished = log.read_text().count('"end_ns":') - 1
    again = bench("run", "-w", "synthetic", "-b", "torch", "-n", "1", "--out", out)
    assert again.returncode == 2 and "bench recover" in again.stderr
    done = bench("recover", out)
    assert done.returncode == 0, done.stderr
    assert "interrupted" in done.stdout
    directory = RunDirectory.open(out)
    record = directory.read_record()
    assert record.run["status"] == "interrupted" and record.run["recovered"] is True
    assert record.metrics["counts"]["completed"] == finished >= 3
    assert record.metrics["ttft_s"]["mean"] > 0
    assert record.backend["used"]["attention"] == "torch"
    assert record.validity[0].startswith("interrupted")
    assert verify(directory) == []
    assert not log.exists()
    assert bench("show", out).returncode == 0
    assert bench("report", out, "-o", tmp_path / "page.html").returncode == 0


def test_two_runs_at_once_do_not_share_a_directory(tmp_path: Path) -> None:
    out = tmp_path / "same"
    command = [sys.executable, "-c", BENCH, "run", "-w", "batch:1x8+4", "-b", "torch", "--max-len", "64"]
    command += ["--warmup", "0", "--num-blocks", "8", "--out", str(out)]
    pair = [
        subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=quiet())
        for _ in range(2)
    ]
    ended = [(process.communicate(timeout=240)[1], process.returncode) for process in pair]
    assert sorted(code == 2 for _, code in ended) == [False, True], ended
    (refused,) = (stderr for stderr, code in ended if code == 2)
    assert "same" in refused and len(refused.strip().splitlines()) == 1
    assert verify(RunDirectory.open(out)) == []


def wait_until(holds: Callable[[], bool], timeout_s: float = 120) -> None:
    until = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.05)
