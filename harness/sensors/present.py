"""The sensors there are on this machine, and what the driver says of its accelerator before it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from backbench.harness.sensors.cpu import HostSensor
from backbench.harness.sensors.process import SensorProcess
from backbench.harness.sensors.source import HOST, Source
from backbench.harness.sensors.telemetry import Sensor

if TYPE_CHECKING:
    from backbench.backends.interface import Device


def source_of(vendor: str, index: int) -> Source:
    """What is sampled beside torch's device `index`; on a CPU its packages' energy.

    Raises OSError or RuntimeError where there is nothing to read.
    """
    if vendor == "nvidia":
        from backbench.harness.sensors import nvidia

        return Source(vendor, index, nvidia.names_of(index))
    if vendor == "amd":
        from backbench.harness.sensors import amd

        return Source(vendor, index, amd.names_of(index))
    from backbench.harness.sensors import rapl

    return Source("cpu", HOST, tuple(map(str, rapl.packages())))


def open_sensors(vendor: str, *indices: int) -> tuple[list[Sensor], list[str]]:
    """The sensors there are here of these devices (none named: the first), and why others are missing.

    What tells of this process is read in it; each device is read in a process of its own.
    """
    on_cpu = vendor not in ("nvidia", "amd")
    sensors: list[Sensor] = [HostSensor()]
    reasons: dict[str, None] = {}
    for index in indices or (0,):
        try:
            found = SensorProcess(source_of(vendor, index))
        except (ImportError, OSError, RuntimeError) as error:
            why = getattr(error, "strerror", None) or error
            without = "no accelerator, and the CPU's energy is not read" if on_cpu else "no GPU telemetry"
            reasons[f"{without}: {why}"] = None
            continue
        sensors.append(found)
        if on_cpu:
            reasons["no accelerator; the energy is that of the CPU packages"] = None
        elif found.missing:
            reasons[f"not offered by this driver or partition: {', '.join(found.missing)}"] = None
    return sensors, list(reasons)


def describe_accelerator(device: Device) -> dict[str, Any]:
    """What the driver says of the GPU, before this process takes it; empty without one."""
    if device.vendor not in ("nvidia", "amd"):
        return {}
    try:
        sensor = source_of(device.vendor, device.torch_device.index or 0).open()
    except (ImportError, OSError, RuntimeError):
        return {}
    facts = sensor.describe()
    sensor.close()
    return facts
