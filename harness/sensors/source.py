"""What a sensor reads, as plain values: its process opens it by them, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from backbench.harness.sensors.telemetry import Sensor

HOST = -1
"""The device of the host's rows."""


class DescribedSensor(Sensor, Protocol):
    """A sensor that also says what it reads, and what it cannot."""

    missing: list[str]
    """Columns that its driver does not offer, known from the first sample on."""

    def describe(self) -> dict[str, Any]:
        """Facts of the device; those of the moment (idle power, idle memory) are asked before it is used."""


@dataclass(frozen=True)
class Source:
    """One device, and the names under which its vendor's library may know it, the likeliest first."""

    vendor: str
    """"nvidia", "amd", or "cpu" for the host's energy counters."""
    index: int
    """As torch counts the devices; HOST for the host."""
    names: tuple[str, ...]

    def open(self) -> DescribedSensor:
        """Its sensor, in this process.

        Raises ImportError, OSError or RuntimeError where the library is missing or does not answer.
        """
        if self.vendor == "nvidia":
            from backbench.harness.sensors.nvidia import NvmlSensor

            return NvmlSensor(self.index, self.names)
        if self.vendor == "amd":
            from backbench.harness.sensors.amd import AmdSmiSensor

            return AmdSmiSensor(self.index, self.names)
        from backbench.harness.sensors.rapl import RaplSensor

        return RaplSensor(self.names)
