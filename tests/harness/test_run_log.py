"""A run's log claims its directory, and gives back what had finished."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from backbench.errors import BackbenchError, HarnessError, ReportError
from backbench.harness.replay import replay
from backbench.harness.run_log import LOG_FILE, RunLog, reading

MS = 1_000_000


def test_one_directory_is_claimed_once(tmp_path: Path) -> None:
    first = RunLog.claim(tmp_path / "same")
    with pytest.raises(HarnessError, match="belongs to a run that is going or was killed"):
        RunLog.claim(tmp_path / "same")
    first.release()
    assert not (tmp_path / "same").exists(), "nothing was written"
    RunLog.claim(tmp_path / "same").release()


def test_an_existing_directory_is_taken_only_if_empty(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    RunLog.claim(tmp_path / "empty").release()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(ReportError, match="not empty"):
        RunLog.claim(tmp_path / "full")
    assert [each.name for each in (tmp_path / "full").iterdir()] == ["mine"]


@pytest.mark.parametrize("new", [True, False], ids=["default", "named"])
def test_synchronised_claims_never_share(tmp_path: Path, new: bool) -> None:
    """Eight threads at a barrier, many times: default names are all given, one name to one of them."""
    for round_ in range(30):
        barrier = threading.Barrier(8)
        claimed: list[RunLog] = []
        refused: list[str] = []

        def claim(
            base: Path = tmp_path / str(round_),
            barrier: Any = barrier,
            won: Any = claimed,
            lost: Any = refused,
        ) -> None:
            barrier.wait()
            try:
                won.append(RunLog.claim_new(base) if new else RunLog.claim(base))
            except BackbenchError as error:
                lost.append(str(error))

        threads = [threading.Thread(target=claim) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({log.directory.path for log in claimed}) == len(claimed) == (8 if new else 1)
        assert len(claimed) + len(refused) == 8
        assert all("belongs to a run" in reason for reason in refused)


def logged(path: Path, target: Any, workload: Any, clock: Any) -> RunLog:
    log = RunLog.claim(path)
    log.begin({"run": {}}, workload, (), clock)
    with log:
        replay(target, workload, clock=clock, on_trace=log.note)
    return log


def test_what_finished_comes_back_as_it_was(
    tmp_path: Path, make_target: Any, make_workload: Any, clock: Any
) -> None:
    script = {0: [(5, 1), (9, 2)], 1: [("error", 3)], 2: [(4, None)], 3: [(1000, 1)]}
    target = make_target(script, interrupt_at_ms=30)
    log = logged(tmp_path / "run", target, make_workload([3, 1, 1, 1], [2, 12, 20, 30]), clock)
    log.release()
    assert (tmp_path / "run" / LOG_FILE).exists(), "no record has these requests"
    with reading(tmp_path / "run") as (known, done):
        assert known == {"run": {}}
        assert done.interrupted and done.mode == "open"
        first, failed, unknown, flying = done.traces
        assert [ns - done.start_ns for ns in first.chunk_ns] == [7 * MS, 11 * MS]
        assert first.chunk_tokens == [1, 2] and first.finished
        assert failed.error == "refused"
        assert unknown.chunk_tokens == [None]
        assert flying.sent_ns == done.start_ns + 30 * MS and flying.end_ns is None
        assert len(first.request.prompt) == 4
        assert done.end_ns - done.start_ns == 30 * MS, "the last thing that was logged"
    assert not (tmp_path / "run" / LOG_FILE).exists()


def test_a_line_cut_in_its_middle_is_left_out(
    tmp_path: Path, make_target: Any, make_workload: Any, clock: Any
) -> None:
    target = make_target({0: [(5, 1)], 1: [(6, 1)]})
    logged(tmp_path / "run", target, make_workload([1, 1]), clock).release()
    file = tmp_path / "run" / LOG_FILE
    file.write_bytes(file.read_bytes()[:-9])
    with reading(tmp_path / "run") as (_, done):
        assert [trace.finished for trace in done.traces] == [True, False]


def test_a_failed_recovery_keeps_the_log(
    tmp_path: Path, make_target: Any, make_workload: Any, clock: Any
) -> None:
    logged(tmp_path / "run", make_target({0: [(5, 1)]}), make_workload([1]), clock).release()
    with pytest.raises(ReportError), reading(tmp_path / "run"):
        raise ReportError("the disk is full")
    assert (tmp_path / "run" / LOG_FILE).exists()


def test_what_cannot_be_recovered_is_said_in_one_line(tmp_path: Path) -> None:
    def refused(path: Path) -> str:
        with pytest.raises(HarnessError) as caught, reading(path):
            pass
        return str(caught.value)

    assert "holds no log" in refused(tmp_path)
    (tmp_path / LOG_FILE).touch()
    assert "before its first request" in refused(tmp_path)
    for text in ("[]\n", "{}\n", "nothing\n", json.dumps({"known": {}, "mode": "open"}) + "\n"):
        (tmp_path / LOG_FILE).write_text(text)
        assert "is not the log of a run" in refused(tmp_path)
    (tmp_path / LOG_FILE).write_bytes(b"\xff\xfe\n")
    assert "is not the log of a run" in refused(tmp_path)


def test_a_run_that_is_still_going_is_not_recovered(tmp_path: Path) -> None:
    """The lock is the process's: from within it could be taken twice."""
    code = (
        "import sys, pathlib\n"
        "from backbench.harness.run_log import RunLog\n"
        "log = RunLog.claim(pathlib.Path(sys.argv[1]))\n"
        "print('claimed', flush=True)\n"
        "sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "claimed\n"
        with pytest.raises(HarnessError, match="still going"), reading(tmp_path / "run"):
            pass
    finally:
        process.kill()
        process.wait()
    with pytest.raises(HarnessError, match="before its first request"), reading(tmp_path / "run"):
        pass


def test_a_file_system_without_locks_can_be_claimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    log = RunLog.claim(tmp_path / "run")
    with pytest.raises(HarnessError, match="belongs to a run"):
        RunLog.claim(tmp_path / "run")
    log.release()


def test_a_full_disk_ends_the_log_and_not_the_run(
    tmp_path: Path, make_target: Any, make_workload: Any, clock: Any
) -> None:
    log = RunLog.claim(tmp_path / "run")
    log.begin({"run": {}}, make_workload([1]), (), clock)

    class Full:
        def write(self, text: str) -> None:
            raise OSError(28, "No space left on device")

        def close(self) -> None: ...

    log._file = Full()  # type: ignore[assignment]
    with log:
        done = replay(make_target({0: [(5, 1)]}), make_workload([1]), clock=clock, on_trace=log.note)
    assert not done.interrupted
    assert log.failure is not None and "No space left" in log.failure
