"""AMD's telemetry, parsed from what amdsmi 7.0.2 returns."""

from __future__ import annotations

import sys
import types
from enum import IntEnum
from typing import Any

import pytest
import torch

from backbench.harness.sensors.amd import AmdSmiSensor, names_of


class AmdSmiException(Exception):
    pass


class Clock(IntEnum):
    GFX = 1
    MEM = 5


ADDRESSES = {"first": "0000:05:00.0", "second": "0000:26:00.0"}


THROTTLED = {
    "throttle_status": "N/A", "prochot_residency_acc": 3, "ppt_residency_acc": 900,
    "socket_thm_residency_acc": 7, "vr_thm_residency_acc": "N/A", "hbm_thm_residency_acc": 0,
}  # fmt: skip


def module(**changed: Any) -> types.ModuleType:
    """amdsmi with two MI300X; functions return what the release's own code builds."""
    smi = types.ModuleType("amdsmi")
    power = {
        "socket_power": 146, "current_socket_power": 146, "average_socket_power": "N/A",
        "gfx_voltage": "N/A", "soc_voltage": "N/A", "mem_voltage": "N/A", "power_limit": 750_000_000,
    }  # fmt: skip
    clocks = {Clock.GFX: 2104, Clock.MEM: 1300}
    answers: dict[str, Any] = {
        "amdsmi_init": lambda: None,
        "amdsmi_shut_down": lambda: None,
        "amdsmi_get_processor_handles": lambda: ["first", "second"],
        "amdsmi_get_gpu_device_bdf": lambda handle: ADDRESSES[handle],
        "amdsmi_get_power_info": lambda handle: power,
        "amdsmi_get_energy_count": lambda handle: {
            "energy_accumulator": 2_000_000, "counter_resolution": 15.26, "timestamp": 1
        },
        "amdsmi_get_clock_info": lambda handle, kind: {
            "clk": clocks[kind], "min_clk": 132, "max_clk": 2100, "clk_locked": False, "clk_deep_sleep": 0
        },
        "amdsmi_get_temp_metric": lambda handle, kind, metric: 43,
        "amdsmi_get_gpu_activity": lambda handle: {
            "gfx_activity": 97, "umc_activity": 12, "mm_activity": "N/A"
        },
        "amdsmi_get_gpu_vram_usage": lambda handle: {"vram_total": 196_592, "vram_used": 283},
        "amdsmi_get_gpu_process_list": lambda handle: [{"pid": 1}, {"pid": 2}],
        "amdsmi_get_gpu_metrics_info": lambda handle: THROTTLED,
        "amdsmi_get_gpu_asic_info": lambda handle: {"market_name": "AMD Instinct MI300X"},
        "amdsmi_get_gpu_driver_info": lambda handle: {"driver_name": "amdgpu", "driver_version": "6.12.12"},
        "AmdSmiClkType": Clock,
        "AmdSmiTemperatureType": types.SimpleNamespace(HOTSPOT=1),
        "AmdSmiTemperatureMetric": types.SimpleNamespace(CURRENT=0),
        "AmdSmiException": AmdSmiException,
    }  # fmt: skip
    for name, answer in (answers | changed).items():
        setattr(smi, name, answer)
    return smi


@pytest.fixture
def second_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = types.SimpleNamespace(pci_domain_id=0, pci_bus_id=0x26, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)


def test_a_sample_in_our_units(monkeypatch: pytest.MonkeyPatch, second_gpu: None) -> None:
    monkeypatch.setitem(sys.modules, "amdsmi", module())
    sensor = AmdSmiSensor(0, names_of(0))
    assert sensor._handle == "second"
    assert sensor.sample() == [
        {
            "device": 0,
            "power_w": 146.0,
            "energy_j": pytest.approx(30.52),
            "sm_clock_mhz": 2104.0,
            "memory_clock_mhz": 1300.0,
            "temperature_c": 43.0,
            "memory_used_bytes": 283 * 2**20,
            "utilization": 97.0,
            "processes": 2,
            "throttle_reasons": 0,
        }
    ]
    assert sensor.missing == []
    assert sensor.describe() == {
        "name": "AMD Instinct MI300X",
        "driver": "6.12.12",
        "memory_bytes": 196_592 * 2**20,
        "idle_power_w": 146.0,
        "idle_memory_bytes": 283 * 2**20,
    }


def test_what_the_driver_does_not_offer_is_left_out_and_asked_once(
    monkeypatch: pytest.MonkeyPatch, second_gpu: None
) -> None:
    asked: list[int] = []

    def fail(handle: Any) -> Any:
        asked.append(1)
        raise AmdSmiException("not supported")

    consumer = {"current_socket_power": "N/A", "average_socket_power": 31}
    changed = {"amdsmi_get_energy_count": fail, "amdsmi_get_power_info": lambda handle: consumer}
    changed["amdsmi_get_gpu_activity"] = lambda handle: {"gfx_activity": "N/A"}
    monkeypatch.setitem(sys.modules, "amdsmi", module(**changed))
    sensor = AmdSmiSensor(0, names_of(0))
    first, second = sensor.sample()[0], sensor.sample()[0]
    assert first == second and len(asked) == 1
    assert first["power_w"] == 31.0
    assert not {"energy_j", "utilization"} & set(first)


def test_a_throttler_that_worked_since_the_last_sample_is_named_as_nvidias(
    monkeypatch: pytest.MonkeyPatch, second_gpu: None
) -> None:
    counts = dict(THROTTLED)
    monkeypatch.setitem(sys.modules, "amdsmi", module(amdsmi_get_gpu_metrics_info=lambda handle: {**counts}))
    sensor = AmdSmiSensor(0, names_of(0))
    assert sensor.sample()[0]["throttle_reasons"] == 0
    counts |= {"ppt_residency_acc": 901, "hbm_thm_residency_acc": 1}
    assert sensor.sample()[0]["throttle_reasons"] == 0x04 | 0x40
    assert sensor.sample()[0]["throttle_reasons"] == 0


def test_a_missing_library_or_card_says_so(monkeypatch: pytest.MonkeyPatch, second_gpu: None) -> None:
    monkeypatch.setitem(sys.modules, "amdsmi", None)
    with pytest.raises(ImportError):
        AmdSmiSensor(0, names_of(0))
    monkeypatch.setitem(sys.modules, "amdsmi", module(amdsmi_get_processor_handles=lambda: ["first"]))
    with pytest.raises(RuntimeError, match="lists no GPU at 0000:26:00"):
        AmdSmiSensor(0, names_of(0))


def test_a_release_without_a_function_lacks_its_reading(
    monkeypatch: pytest.MonkeyPatch, second_gpu: None
) -> None:
    older = module()
    del older.amdsmi_get_gpu_metrics_info
    monkeypatch.setitem(sys.modules, "amdsmi", older)
    sensor = AmdSmiSensor(0, names_of(0))
    assert "throttle_reasons" not in sensor.sample()[0]
    assert sensor.missing == ["throttle_reasons"]
