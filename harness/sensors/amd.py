"""Samples of an AMD GPU through `amdsmi`, which comes with ROCm. Not run on such a GPU: checked against
the shapes that release 7.0.2 returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from backbench.harness.sensors.telemetry import Row

ABSENT = "N/A"
"""What amdsmi returns where the driver offers no reading."""
MIB = 2**20
THROTTLERS = {
    "prochot_residency_acc": 0x08,
    "ppt_residency_acc": 0x04,
    "socket_thm_residency_acc": 0x40,
    "vr_thm_residency_acc": 0x40,
    "hbm_thm_residency_acc": 0x40,
}
"""Counters of the time a throttler was at work -> the bit that NVML has for its kind (hardware slowdown,
power cap, hardware thermal slowdown), so that the record has one meaning for it."""


class AmdSmiSensor:
    """One AMD GPU. A reading the driver does not offer is left out, and is asked once."""

    def __init__(self, index: int, addresses: Sequence[str]) -> None:
        """`index` counts the devices torch sees; `addresses` from `names_of`.

        Raises RuntimeError where amdsmi does not answer or lists no GPU there.
        """
        import amdsmi

        self._smi = amdsmi
        self._index = index
        self._throttled_before: dict[str, int] = {}
        self.missing: list[str] = []
        """Columns that the driver does not offer."""
        try:
            amdsmi.amdsmi_init()
            self._handle = _handle_of(amdsmi, addresses)
        except amdsmi.AmdSmiException as error:
            raise RuntimeError(f"amdsmi does not answer: {error}") from None
        self._readers: dict[str, Callable[[], float | int]] = {
            "power_w": self._power_w,
            "energy_j": self._energy_j,
            "sm_clock_mhz": lambda: self._clock_mhz("GFX"),
            "memory_clock_mhz": lambda: self._clock_mhz("MEM"),
            "temperature_c": self._temperature_c,
            "memory_used_bytes": self._memory_used_bytes,
            "utilization": lambda: number(amdsmi.amdsmi_get_gpu_activity(self._handle)["gfx_activity"]),
            "processes": lambda: len(amdsmi.amdsmi_get_gpu_process_list(self._handle)),
            "throttle_reasons": self._throttle_reasons,
        }

    def sample(self) -> list[Row]:
        row: Row = {"device": self._index}
        for name, read in list(self._readers.items()):
            try:
                row[name] = read()
            except (self._smi.AmdSmiException, LookupError, AttributeError):  # the last: an older release
                del self._readers[name]  # this driver or partition does not offer it
                self.missing.append(name)
        return [row]

    def describe(self) -> dict[str, Any]:
        """Facts of the card for the record's `system` section; what the driver does not offer is left out."""
        smi, handle = self._smi, self._handle
        facts: dict[str, Callable[[], Any]] = {
            "name": lambda: text(smi.amdsmi_get_gpu_asic_info(handle)["market_name"]),
            "driver": lambda: text(smi.amdsmi_get_gpu_driver_info(handle)["driver_version"]),
            "memory_bytes": lambda: int(number(smi.amdsmi_get_gpu_vram_usage(handle)["vram_total"]) * MIB),
            "idle_power_w": self._power_w,
            "idle_memory_bytes": self._memory_used_bytes,
        }
        known: dict[str, Any] = {}
        for name, read in facts.items():
            try:
                known[name] = read()
            except (smi.AmdSmiException, LookupError):
                continue
        return known

    def close(self) -> None:
        self._smi.amdsmi_shut_down()

    def _memory_used_bytes(self) -> int:
        return int(number(self._smi.amdsmi_get_gpu_vram_usage(self._handle)["vram_used"]) * MIB)

    def _power_w(self) -> float:
        """Of the moment on data-centre parts; others report an average only."""
        info = self._smi.amdsmi_get_power_info(self._handle)
        offered = (info.get(name, ABSENT) for name in ("current_socket_power", "average_socket_power"))
        return number(next((value for value in offered if value not in (ABSENT, 0)), ABSENT))

    def _energy_j(self) -> float:
        """The accumulator counts steps of `counter_resolution` microjoules."""
        count = self._smi.amdsmi_get_energy_count(self._handle)
        return number(count["energy_accumulator"]) * number(count["counter_resolution"]) / 1e6

    def _throttle_reasons(self) -> int:
        """Bits of the throttlers that were at work since the last sample; none in the first one."""
        metrics = self._smi.amdsmi_get_gpu_metrics_info(self._handle)
        now = {name: int(number(metrics[name])) for name in THROTTLERS if metrics.get(name, ABSENT) != ABSENT}
        if not now:
            raise LookupError("the driver counts no throttling")
        before, self._throttled_before = self._throttled_before, now
        bits = 0
        for name, count in now.items():
            bits |= THROTTLERS[name] if count > before.get(name, count) else 0
        return bits

    def _clock_mhz(self, which: str) -> float:
        kind = getattr(self._smi.AmdSmiClkType, which)
        return number(self._smi.amdsmi_get_clock_info(self._handle, kind)["clk"])

    def _temperature_c(self) -> float:
        kind, metric = self._smi.AmdSmiTemperatureType.HOTSPOT, self._smi.AmdSmiTemperatureMetric.CURRENT
        return number(self._smi.amdsmi_get_temp_metric(self._handle, kind, metric))


def number(value: Any) -> float:
    """A reading as a float; LookupError where the driver offers none."""
    if value == ABSENT or value is None:
        raise LookupError("the driver offers no such reading")
    return float(value)


def text(value: str) -> str:
    """A name; LookupError where the driver offers none."""
    if value == ABSENT:
        raise LookupError("the driver offers no such name")
    return value


def names_of(index: int) -> tuple[str, ...]:
    """The PCI address of torch's device `index`: amdsmi has an order of its own, and HIP_VISIBLE_DEVICES
    renumbers."""
    import torch

    properties: Any = torch.cuda.get_device_properties(index)
    return (f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}",)


def _handle_of(amdsmi: Any, addresses: Sequence[str]) -> Any:
    """The handle of the GPU at one of these addresses."""
    for handle in amdsmi.amdsmi_get_processor_handles():
        if str(amdsmi.amdsmi_get_gpu_device_bdf(handle)).lower().startswith(tuple(addresses)):
            return handle
    raise RuntimeError(f"amdsmi lists no GPU at {' or '.join(addresses)}")
