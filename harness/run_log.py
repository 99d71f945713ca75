"""The append-only log of a run: it claims the run's directory, and keeps what finished if the run is killed.

The log is made when the run starts and removed when its record is written. Making it is exclusive, so two
runs never share a directory. Its first line holds everything that was known before the first request; each
further one a request that was sent or that ended, with raw readings of the run's clock. `reading` gives
them back as a replay that was cut short.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType, TracebackType
from typing import IO, Any

from backbench.errors import HarnessError, ReportError
from backbench.harness.replay import Mode, Replay, mode_of
from backbench.harness.sessions import Trace
from backbench.reports.record import RECORD_FILE, RunDirectory, finite
from backbench.reports.record.schema import LOG_FILE
from backbench.workloads.request import Request, Workload

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # no such locks on this system: a running and a killed run's log look alike there
    fcntl = None

FLUSH_PERIOD_S = 0.5
"""A kill loses what ended in the last half second."""


class RunLog:
    """The claim on one run's directory, and what happened in it."""

    def __init__(self, directory: RunDirectory, file: IO[str]) -> None:
        """Use `claim` or `claim_new`."""
        self.directory = directory
        self.failure: str | None = None
        """Why nothing more could be logged; the run goes on without."""
        self._file = file
        self._logged = False
        """Something was sent or ended, and it stands in the file."""
        self._noted: deque[Trace | tuple[int, ...]] = deque()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @classmethod
    def claim(cls, path: Path) -> RunLog:
        """Claim `path`, new or empty, for one run.

        Raises:
            HarnessError: another run has it, or one that was killed left its log there.
            ReportError: it is not empty, no directory, or cannot be written.
        """
        try:
            directory = RunDirectory.create(path)
        except ReportError:
            _refuse_claimed(path)
            raise
        log = path / LOG_FILE
        try:
            file = log.open("x", encoding="utf-8")
        except FileExistsError:
            _refuse_claimed(path)
            raise
        except OSError as error:
            raise ReportError(f"Cannot write in {path}: {error.strerror}; choose another --out.") from None
        if any(each != log for each in path.iterdir()):  # another run came and went since it was empty
            file.close()
            log.unlink()
            raise ReportError(f"{path} exists and is not empty; choose another --out or remove it.")
        _lock(file)
        return cls(directory, file)

    @classmethod
    def claim_new(cls, base: Path) -> RunLog:
        """Claim `base`, or the first of `base`-1, `base`-2, ... that no other run has made."""
        for number in itertools.count():
            path = base if number == 0 else base.with_name(f"{base.name}-{number}")
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                continue
            except OSError as error:
                raise ReportError(f"Cannot create {path}: {error.strerror}; choose an --out.") from None
            return cls.claim(path)
        raise AssertionError("unreachable")

    def begin(
        self,
        known: dict[str, Any],
        workload: Workload,
        warmup: Sequence[Request],
        clock: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        """Write what is known before the first request."""
        line = {
            "known": finite(known),
            "mode": mode_of(workload),
            "unix_minus_clock_ns": time.time_ns() - clock(),
            "requests": [_request_line(request) for request in (*warmup, *workload.requests)],
        }
        self._write([line])

    def note(self, trace: Trace) -> None:
        """A request was sent, ended, or was given up; cheap, written later by a thread of its own."""
        if trace.end_ns is None:
            times_ns = trace.intended_ns or 0, trace.sent_ns or 0
            self._noted.append((trace.request.id, *times_ns, len(trace.request.prompt)))
        else:
            self._noted.append(trace)

    def __enter__(self) -> RunLog:
        self._stop.clear()
        self._thread = threading.Thread(target=self._loop, name="run log", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def release(self) -> None:
        """Give the directory up: the log goes, unless it holds requests that no record has."""
        path = self.directory.path
        try:
            self._file.close()
        except OSError as error:  # what a full disk refused is still in its buffer
            self.failure = self.failure or f"the log of finished requests ended early: {error.strerror}"
        if not self._logged or (path / RECORD_FILE).exists():
            (path / LOG_FILE).unlink(missing_ok=True)
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()

    def _loop(self) -> None:
        while not self._stop.wait(FLUSH_PERIOD_S):
            self._flush()
        self._flush()

    def _flush(self) -> None:
        lines = [_note_line(self._noted.popleft()) for _ in range(len(self._noted))]
        self._write(lines)
        self._logged |= bool(lines)

    def _write(self, lines: list[dict[str, Any]]) -> None:
        if not lines or self.failure is not None:
            return
        try:
            self._file.write("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))
            self._file.flush()
        except OSError as error:
            self.failure = f"the log of finished requests ended early: {error.strerror}"


@contextmanager
def reading(path: Path) -> Iterator[tuple[dict[str, Any], Replay]]:
    """What was known of a killed run, and its replay as far as it was logged; at the end the log is removed.

    Raises HarnessError where there is no log, its run is still going, or no request had been sent.
    """
    log = path / LOG_FILE
    if not log.is_file():
        raise HarnessError(f"{path} holds no log of a run that was killed ({LOG_FILE}); nothing to recover.")
    try:
        file = log.open("r+", encoding="utf-8")
    except OSError as error:
        raise HarnessError(f"{log} cannot be opened ({error.strerror}); nothing to recover.") from None
    with file:
        if not _lock(file):
            raise HarnessError(f"The run in {path} is still going; wait for it, or stop it first.")
        try:
            known, replay = _replay(list(_lines(file)))
        except (LookupError, TypeError, ValueError, AttributeError):
            raise HarnessError(f"{log} is not the log of a run; nothing to recover.") from None
        if replay is None:
            raise HarnessError(f"The run in {path} was killed before its first request; remove {path}.")
        yield known, replay
    log.unlink()


def _lines(file: IO[str]) -> list[Any]:
    """The whole lines; the last one may have been cut."""
    found = []
    for line in file:
        if line.endswith("\n"):
            found.append(json.loads(line))
    return found


def _replay(lines: list[Any]) -> tuple[dict[str, Any], Replay | None]:
    if not lines:
        return {}, None
    mode: Mode = lines[0]["mode"]
    requests = [_request(line) for line in lines[0]["requests"]]
    traces = {request.id: Trace(request) for request in requests}
    start_ns: int | None = None
    end_ns = 0
    for line in lines[1:]:
        trace = traces[line["id"]]
        if "sent_ns" in line:
            trace.intended_ns, trace.sent_ns = int(line["intended_ns"]), int(line["sent_ns"])
            if len(trace.request.prompt) != line["prompt_tokens"]:  # a later turn, after a shorter answer
                trace.request = replace(trace.request, prompt=(0,) * int(line["prompt_tokens"]))
            if start_ns is None and trace.request.id >= 0:
                start_ns = trace.intended_ns - (trace.request.arrival_ns if mode == "open" else 0)
        else:
            trace.chunk_ns, trace.chunk_tokens = list(line["chunk_ns"]), list(line["chunk_tokens"])
            trace.end_ns, trace.error = int(line["end_ns"]), line["error"]
            trace.usage_tokens = line.get("usage_tokens")
            if trace.sent_ns is None:  # given up when an earlier turn of its session failed
                trace.intended_ns = trace.end_ns
        end_ns = max(end_ns, trace.sent_ns or 0, trace.end_ns or 0)
    if start_ns is None:
        return lines[0]["known"], None
    measured = [trace for trace in traces.values() if trace.request.id >= 0]
    warmup = [trace for trace in traces.values() if trace.request.id < 0]
    if mode == "open":
        for trace in measured:
            if trace.request.follows is None:
                trace.intended_ns = start_ns + trace.request.arrival_ns
    anchor = start_ns + int(lines[0]["unix_minus_clock_ns"])
    replay = Replay(mode, tuple(measured), tuple(warmup), start_ns, end_ns, anchor, interrupted=True)
    return lines[0]["known"], replay


def _note_line(noted: Trace | tuple[int, ...]) -> dict[str, Any]:
    if isinstance(noted, tuple):
        return dict(zip(("id", "intended_ns", "sent_ns", "prompt_tokens"), noted, strict=True))
    return {
        "id": noted.request.id,
        "end_ns": noted.end_ns,
        "chunk_ns": noted.chunk_ns,
        "chunk_tokens": noted.chunk_tokens,
        "usage_tokens": noted.usage_tokens,
        "error": noted.error,
    }


def _request_line(request: Request) -> list[Any]:
    planned = [request.id, request.session, request.arrival_ns, len(request.prompt), request.output_tokens]
    return [*planned, request.follows, request.think_ns]


def _request(line: list[Any]) -> Request:
    """A request whose prompt has the right length; its tokens are not logged."""
    identifier, session, arrival_ns, prompt_tokens, output_tokens, follows, think_ns = line
    prompt = (0,) * prompt_tokens
    return Request(identifier, arrival_ns, prompt, output_tokens, session, follows=follows, think_ns=think_ns)


def _lock(file: IO[str]) -> bool:
    """Take the lock that a run holds on its log as long as it lives; False where another has it.

    Where there are no locks it is True: the claim stands without, only a living run's log can be recovered.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system that has none
        return True
    return True


def _refuse_claimed(path: Path) -> None:
    if (path / LOG_FILE).exists():
        raise HarnessError(
            f"{path} belongs to a run that is going or was killed; choose another --out, "
            f"or `bench recover {path}` what had finished."
        )
