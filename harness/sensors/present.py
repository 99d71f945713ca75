"""The sensors there are on this machine, and what the driver says of its accelerator before it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from backbench.harness.sensors.cpu import HostSensor
from backbench.harness.sensors.telemetry import Sensor

if TYPE_CHECKING:
    from backbench.backends.interface import Device


class AcceleratorSensor(Sensor, Protocol):
    """A sensor of one card, which its driver also describes."""

    def describe(self) -> dict[str, Any]:
        """Facts of the card; those of the moment (idle power, idle memory) are asked before it is used."""


def accelerator_sensor(vendor: str, index: int) -> AcceleratorSensor | None:
    """The sensor of torch's device `index`; None where the vendor's cards have none.

    Raises ImportError, OSError or RuntimeError where the vendor's library is missing or does not answer.
    """
    if vendor == "nvidia":
        from backbench.harness.sensors.nvidia import NvmlSensor

        return NvmlSensor(index)
    if vendor == "amd":
        from backbench.harness.sensors.amd import AmdSmiSensor

        return AmdSmiSensor(index)
    return None


def open_sensors(vendor: str, index: int = 0) -> tuple[list[Sensor], list[str]]:
    """The sensors there are here, and why others are missing."""
    sensors: list[Sensor] = [HostSensor()]
    try:
        found = accelerator_sensor(vendor, index)
    except (ImportError, OSError, RuntimeError) as error:
        return sensors, [f"no GPU telemetry: {error}"]
    if found is None:
        return sensors, ["no accelerator, and this host's energy counters are not read"]
    return [*sensors, found], []


def describe_accelerator(device: Device) -> dict[str, Any]:
    """What the driver says of the GPU, before this process takes it; empty without one."""
    try:
        sensor = accelerator_sensor(device.vendor, device.torch_device.index or 0)
    except (ImportError, OSError, RuntimeError):
        return {}
    if sensor is None:
        return {}
    facts = sensor.describe()
    sensor.close()
    return facts
