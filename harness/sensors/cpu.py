"""CPU use and resident memory of this process."""

from __future__ import annotations

from backbench.harness.sensors.telemetry import Row


class HostSensor:
    """CPU use and resident memory of this process: device -1."""

    def __init__(self) -> None:
        import psutil

        self._process = psutil.Process()
        self._process.cpu_percent()  # the first call starts the interval and says 0

    def sample(self) -> list[Row]:
        return [
            {
                "device": -1,
                "host_cpu_percent": float(self._process.cpu_percent()),
                "host_rss_bytes": int(self._process.memory_info().rss),
            }
        ]

    def close(self) -> None:
        pass
