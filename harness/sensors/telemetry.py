"""Samples of power, clocks, temperature and memory during a run, gathered by a thread of their own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

Row = dict[str, Any]

PERIOD_S = 0.05
"""NVIDIA's energy counter steps about every 100 ms; twice as often sees every step."""


class Sensor(Protocol):
    """One source of samples. A row holds columns of `reports.record.TELEMETRY_COLUMNS`."""

    def sample(self) -> list[Row]:
        """What is to be said now; a row without `time_ns` is of this moment."""

    def close(self) -> None: ...


class Telemetry:
    """Samples every sensor each `period_s` on a thread, between `with` and its end."""

    def __init__(
        self,
        sensors: list[Sensor],
        reasons: list[str] | None = None,
        period_s: float = PERIOD_S,
        clock: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        self.rows: list[Row] = []
        """With `time_ns`, raw readings of the clock."""
        self.reasons = reasons or []
        """Why something is missing."""
        self.period_s = period_s
        self._sensors = sensors
        self._clock = clock
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Telemetry:
        if self._sensors:
            self._sample()  # before anything that is measured
            self._thread = threading.Thread(target=self._loop, name="telemetry", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        for sensor in self._sensors:
            sensor.close()

    def _loop(self) -> None:
        while not self._stop.is_set():
            self._sample()
            self._stop.wait(self.period_s)
        self._sample()  # so that the samples reach beyond the last token

    def _sample(self) -> None:
        for sensor in list(self._sensors):
            try:
                rows = sensor.sample()
            except Exception as error:  # a broken sensor must not end the run; the record says so
                self.reasons.append(f"{type(sensor).__name__} stopped: {' '.join(str(error).split())}")
                self._sensors.remove(sensor)
                sensor.close()
                continue
            time_ns = self._clock()
            self.rows.extend({"time_ns": time_ns, **row} for row in rows)
