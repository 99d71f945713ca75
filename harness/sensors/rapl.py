"""Energy of a host's CPU packages by Intel's RAPL counters, which AMD's CPUs have too (Linux powercap)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from backbench.harness.sensors.telemetry import Row

POWERCAP = Path("/sys/class/powercap")
"""A package is intel-rapl:N here; its parts are intel-rapl:N:M and would count twice."""


def packages(powercap: Path = POWERCAP) -> list[Path]:
    """The zones of whole packages; an OSError says why there are none to read (mostly they are root's)."""
    found = sorted(zone for zone in powercap.glob("intel-rapl:*") if zone.name.count(":") == 1)
    if not found:
        raise OSError("this system has no RAPL counters")
    for zone in found:
        int((zone / "energy_uj").read_text())
    return found


class RaplSensor:
    """Joules that all packages drew, from the moment it was opened, wrap-arounds added back."""

    def __init__(self, zones: Sequence[str]) -> None:
        """`zones`: the directories of the packages. Raises OSError where one cannot be read."""
        self.missing = ["power_w"]
        self._zones = [Path(zone) for zone in zones]
        self._ranges = [int((zone / "max_energy_range_uj").read_text()) for zone in self._zones]
        self._last = self._read()
        self._total_uj = 0

    def sample(self) -> list[Row]:
        now = self._read()
        for before, after, most in zip(self._last, now, self._ranges, strict=True):
            self._total_uj += after - before if after >= before else after - before + most + 1
        self._last = now
        return [{"device": -1, "energy_j": self._total_uj / 1e6}]

    def describe(self) -> dict[str, Any]:
        return {"packages": len(self._zones)}

    def close(self) -> None:
        pass

    def _read(self) -> list[int]:
        return [int((zone / "energy_uj").read_text()) for zone in self._zones]
