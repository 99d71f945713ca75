"""A sensor in a process of its own: neither waits for the other's threads, and neither takes the other down.

    python -m backbench.harness.sensors.process PARENT SOURCE

The child samples when its parent asks (a byte on stdin), and by itself where that comes late: at 10 Hz at
least, however busy the parent is. Each sample is a line of JSON on stdout with the child's own monotonic
stamp. It imports the sensor's library and nothing of the engine, and ends with its stdin and its parent.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from backbench.harness.lifetime import die_with
from backbench.harness.sensors.source import Source
from backbench.harness.sensors.telemetry import Row

LONGEST_GAP_S = 0.1
"""The child samples this often, asked or not."""
STARTS_WITHIN_S = 30.0
"""Loading a vendor's library on a busy machine takes seconds."""
ANSWERS_WITHIN_S = 2.0
"""A driver that takes longer hangs."""
ONE_CLOCK = "clock_gettime(CLOCK_MONOTONIC)"
"""Python's `perf_counter` on Linux: one count for every process of the machine."""


class SensorProcess:
    """The sensor of `source`, read in a child.

    `sample` gives every row since the last call, the newest taken after the call began, each with its own
    `time_ns`. What the child had said is kept when it ends; the call after that raises RuntimeError.
    """

    def __init__(self, source: Source) -> None:
        """Start it and wait for its first sample. Raises RuntimeError, which says why there is none."""
        if time.get_clock_info("perf_counter").implementation != ONE_CLOCK:
            raise RuntimeError("this system's processes share no monotonic clock")
        self._text = b""
        self._open = True
        begin_ns = time.perf_counter_ns()
        self._process = _start(source)
        self._poll = select.poll()
        self._poll.register(self._out, select.POLLIN)
        try:
            ready = self._line(STARTS_WITHIN_S)
            if ready is None:
                raise RuntimeError(self._ending())
            if not begin_ns <= ready["clock_ns"] <= time.perf_counter_ns():
                raise RuntimeError("the sensor process has another clock than this one")
        except BaseException:
            self.close()
            raise
        self.missing: list[str] = ready["missing"]
        """Columns that the driver does not offer."""

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def _out(self) -> int:
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def sample(self) -> list[Row]:
        asked_ns = time.perf_counter_ns()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # what it said before it ended is still to be read
            os.write(self._process.stdin.fileno(), b".")
        rows: list[Row] = []
        while not rows or rows[-1]["time_ns"] < asked_ns:
            said = self._line(ANSWERS_WITHIN_S)
            if said is None and not rows:
                raise RuntimeError(self._ending())
            if said is None:
                break
            rows += said
        return rows

    def close(self) -> None:
        """End it; once, however it stands."""
        if not self._open:
            return
        self._open = False
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(ANSWERS_WITHIN_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _line(self, within_s: float) -> Any:
        """The next line it says; None where it has ended. RuntimeError where it is late or says a fault."""
        until_s = time.monotonic() + within_s
        while b"\n" not in self._text:
            if not self._poll.poll(max(0.0, until_s - time.monotonic()) * 1e3):
                raise RuntimeError(f"the sensor process did not answer within {within_s:g} s")
            read = os.read(self._out, 1 << 16)
            if not read:
                return None
            self._text += read
        line, _, self._text = self._text.partition(b"\n")
        said = json.loads(line)
        if isinstance(said, dict) and "error" in said:
            raise RuntimeError(said["error"])
        return said

    def _ending(self) -> str:
        try:
            code = self._process.wait(ANSWERS_WITHIN_S)
        except subprocess.TimeoutExpired:
            return "the sensor process closed its output"
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"over, with code {code}"
        return f"the sensor process was {how}"


def _start(source: Source) -> subprocess.Popen[bytes]:
    """A group of its own: Ctrl-C in a terminal must not end it before the last token."""
    home = str(Path(__file__).parents[3])
    paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-P", "-m", __name__, str(os.getpid()), json.dumps(asdict(source))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        process_group=0,
    )


def serve(source: Source) -> None:
    """The child's whole life: open the sensor, say that it is there, sample until stdin ends."""
    try:
        sensor = source.open()
        sensor.sample()  # asks for every reading once, so that `missing` is known
    except Exception as error:  # said to the parent, whose record keeps it
        _say({"error": " ".join(str(error).split()) or type(error).__name__})
        return
    _say({"clock_ns": time.perf_counter_ns(), "missing": sensor.missing})
    asked = select.poll()
    asked.register(sys.stdin.fileno(), select.POLLIN)
    while not asked.poll(LONGEST_GAP_S * 1e3) or os.read(sys.stdin.fileno(), 4096):
        try:
            rows = sensor.sample()
        except Exception as error:  # a broken sensor: the record says so
            _say({"error": f"{type(error).__name__}: {' '.join(str(error).split())}"})
            return
        stamps = {"time_ns": time.perf_counter_ns(), "sampler_cpu_s": time.process_time()}
        _say([stamps | row for row in rows])
    sensor.close()


def _say(value: Any) -> None:
    try:
        os.write(sys.stdout.fileno(), json.dumps(value).encode() + b"\n")
    except BrokenPipeError:  # nobody is left to hear it
        sys.exit(0)


if __name__ == "__main__":
    die_with(int(sys.argv[1]))
    given = json.loads(sys.argv[2])
    serve(Source(given["vendor"], given["index"], tuple(given["names"])))
