"""Samples of an NVIDIA GPU through NVML."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from backbench.harness.sensors.telemetry import Row


class NvmlSensor:
    """One NVIDIA GPU, or a MIG slice of one, through NVML. A reading the driver does not offer is null, and
    is asked once: a slice has memory and processes of its own, and no power, clocks or temperature."""

    def __init__(self, index: int, uuids: Sequence[str]) -> None:
        """`index` counts the devices torch sees; `uuids` from `names_of`.

        Raises RuntimeError where NVML does not answer or knows none of them.
        """
        import pynvml

        self._nvml = pynvml
        self._index = index
        self.missing: list[str] = []
        """Columns that the driver does not offer."""
        try:
            pynvml.nvmlInit()
            self._handle = _handle_of(uuids)
            self._memory_info = _memory_info_of(self._handle)
        except pynvml.NVMLError as error:
            raise RuntimeError(f"NVML does not answer: {error}") from None
        self._readers: dict[str, Callable[[], float | int]] = {
            "power_w": lambda: pynvml.nvmlDeviceGetPowerUsage(self._handle) / 1e3,
            "energy_j": lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3,
            "sm_clock_mhz": lambda: float(pynvml.nvmlDeviceGetClockInfo(self._handle, pynvml.NVML_CLOCK_SM)),
            "memory_clock_mhz": lambda: float(
                pynvml.nvmlDeviceGetClockInfo(self._handle, pynvml.NVML_CLOCK_MEM)
            ),
            "temperature_c": lambda: float(
                pynvml.nvmlDeviceGetTemperature(self._handle, pynvml.NVML_TEMPERATURE_GPU)
            ),
            "memory_used_bytes": lambda: int(self._memory_info().used),
            "utilization": lambda: float(pynvml.nvmlDeviceGetUtilizationRates(self._handle).gpu),
            "processes": lambda: len(pynvml.nvmlDeviceGetComputeRunningProcesses(self._handle)),
            "throttle_reasons": lambda: int(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._handle)),
        }

    def sample(self) -> list[Row]:
        row: Row = {"device": self._index}
        for name, read in list(self._readers.items()):
            try:
                row[name] = read()
            except self._nvml.NVMLError:
                del self._readers[name]  # this driver or partition does not offer it
                self.missing.append(name)
        return [row]

    def describe(self) -> dict[str, Any]:
        """Facts of the card for the record's `system` section; what the driver does not offer is left out.

        Idle power, idle memory and processes are those of the moment: ask before the card is used.
        """
        nvml, handle = self._nvml, self._handle
        facts: dict[str, Callable[[], Any]] = {
            "name": lambda: nvml.nvmlDeviceGetName(handle),
            "driver": nvml.nvmlSystemGetDriverVersion,
            "memory_bytes": lambda: int(self._memory_info().total),
            "power_limit_w": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3,
            "max_sm_clock_mhz": lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM),
            "max_memory_clock_mhz": lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM),
            "ecc": lambda: bool(nvml.nvmlDeviceGetEccMode(handle)[0]),
            "partitioned": lambda: bool(nvml.nvmlDeviceGetMigMode(handle)[0]),
            "pcie_generation": lambda: nvml.nvmlDeviceGetCurrPcieLinkGeneration(handle),
            "idle_power_w": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            "idle_memory_bytes": lambda: int(self._memory_info().used),
            "pcie_width": lambda: nvml.nvmlDeviceGetCurrPcieLinkWidth(handle),
            "processes": lambda: len(nvml.nvmlDeviceGetComputeRunningProcesses(handle)),
        }
        known: dict[str, Any] = {}
        for name, read in facts.items():
            try:
                known[name] = read()
            except nvml.NVMLError:
                continue
        return known

    def close(self) -> None:
        self._nvml.nvmlShutdown()


def _memory_info_of(handle: Any) -> Callable[[], Any]:
    """The driver's memory counter, one for all readings of a sensor: those of two counters do not subtract.

    Version 1 counts what the driver reserves for itself (480 MiB on an H100) as used once the card is in
    use, version 2 names it apart. Drivers before 510 have version 1 only.
    """
    import pynvml

    def second() -> Any:
        return pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)

    try:
        second()
    except pynvml.NVMLError:
        return lambda: pynvml.nvmlDeviceGetMemoryInfo(handle)
    return second


def names_of(index: int) -> tuple[str, ...]:
    """The UUIDs by which NVML may know torch's device `index`; its number does not do, since
    CUDA_VISIBLE_DEVICES renumbers.

    CUDA says of a MIG slice the slice's UUID, and NVML knows whole cards and slices by different prefixes.
    A driver that says the card's instead leaves the slice's in CUDA_VISIBLE_DEVICES, where it was chosen.
    """
    import torch

    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if index < len(chosen) and chosen[index].strip().startswith("MIG-"):
        return (chosen[index].strip(),)
    uuid = str(torch.cuda.get_device_properties(index).uuid)
    return (uuid,) if uuid.startswith(("GPU-", "MIG-")) else (f"GPU-{uuid}", f"MIG-{uuid}")


def _handle_of(uuids: Sequence[str]) -> Any:
    """The handle of the first of these that NVML knows."""
    import pynvml

    for uuid in uuids[:-1]:
        try:
            return pynvml.nvmlDeviceGetHandleByUUID(uuid)
        except pynvml.NVMLError_NotFound:
            continue
    return pynvml.nvmlDeviceGetHandleByUUID(uuids[-1])
