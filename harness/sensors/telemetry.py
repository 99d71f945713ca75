"""Samples of power, clocks, temperature and memory during a run, from a thread of their own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

Row = dict[str, Any]

PERIOD_S = 0.05
"""NVIDIA's energy counter steps about every 100 ms; twice as often sees every step."""


class Sensor(Protocol):
    """One source of samples. Each row holds columns of `reports.record.TELEMETRY_COLUMNS` but the time."""

    def sample(self) -> list[Row]:
        """One row a device."""

    def close(self) -> None: ...


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


class NvmlSensor:
    """One NVIDIA GPU through NVML. A reading the driver does not offer is null, and is asked once."""

    def __init__(self, index: int = 0) -> None:
        """`index` counts the devices torch sees. Raises RuntimeError where NVML does not answer."""
        import pynvml

        self._nvml = pynvml
        self._index = index
        try:
            pynvml.nvmlInit()
            self._handle = _handle_of(index)
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
            "memory_used_bytes": lambda: int(pynvml.nvmlDeviceGetMemoryInfo(self._handle).used),
            "utilization": lambda: float(pynvml.nvmlDeviceGetUtilizationRates(self._handle).gpu),
            "throttle_reasons": lambda: int(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._handle)),
        }

    def sample(self) -> list[Row]:
        row: Row = {"device": self._index}
        for name, read in list(self._readers.items()):
            try:
                row[name] = read()
            except self._nvml.NVMLError:
                del self._readers[name]  # this driver or partition does not offer it
        return [row]

    def describe(self) -> dict[str, Any]:
        """Facts of the card for the record's `system` section; what the driver does not offer is left out.

        Idle power and processes are those of the moment: ask before the card is used.
        """
        nvml, handle = self._nvml, self._handle
        facts: dict[str, Callable[[], Any]] = {
            "name": lambda: nvml.nvmlDeviceGetName(handle),
            "driver": nvml.nvmlSystemGetDriverVersion,
            "memory_bytes": lambda: int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
            "power_limit_w": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3,
            "max_sm_clock_mhz": lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM),
            "max_memory_clock_mhz": lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM),
            "ecc": lambda: bool(nvml.nvmlDeviceGetEccMode(handle)[0]),
            "partitioned": lambda: bool(nvml.nvmlDeviceGetMigMode(handle)[0]),
            "pcie_generation": lambda: nvml.nvmlDeviceGetCurrPcieLinkGeneration(handle),
            "idle_power_w": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
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


def _handle_of(index: int) -> Any:
    """The NVML handle of torch's device `index`: by UUID, since CUDA_VISIBLE_DEVICES renumbers."""
    import pynvml
    import torch

    uuid = str(torch.cuda.get_device_properties(index).uuid)
    return pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")


def open_sensors(vendor: str, device_index: int = 0) -> tuple[list[Sensor], list[str]]:
    """The sensors there are here, and why others are missing."""
    sensors: list[Sensor] = [HostSensor()]
    reasons: list[str] = []
    if vendor == "nvidia":
        try:
            sensors.append(NvmlSensor(device_index))
        except (ImportError, RuntimeError) as error:
            reasons.append(f"no GPU telemetry: {error}")
    elif vendor == "amd":
        from backbench.harness.sensors.amd import AmdSmiSensor

        try:
            sensors.append(AmdSmiSensor(device_index))
        except (ImportError, OSError, RuntimeError) as error:
            reasons.append(f"no GPU telemetry: {error}")
    else:
        reasons.append("no accelerator, and this host's energy counters are not read")
    return sensors, reasons


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
