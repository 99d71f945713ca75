"""NVIDIA's telemetry, against an NVML that answers as the driver does."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch

from backbench.harness.sensors.nvidia import NvmlSensor, names_of
from backbench.harness.sensors.present import describe_accelerator

MIB = 2**20
CARD, SLICE = "11111111-1111-1111-1111-111111111111", "22222222-2222-2222-2222-222222222222"


class NVMLError(Exception):
    pass


class NotFound(NVMLError):
    pass


RESERVE = 480 * MIB
USED = 1000 * MIB


def module(second_version: bool = True, uuids: tuple[str, ...] = (f"GPU-{CARD}",)) -> types.ModuleType:
    """NVML of one card. Version 1 of its memory counter has the driver's reserve among what is used."""
    nvml = types.ModuleType("pynvml")

    def memory(handle: str, version: int | None = None) -> Any:
        if version is None:
            return types.SimpleNamespace(used=USED + RESERVE, total=80_000 * MIB)
        if not second_version:
            raise NVMLError("Function Not Found")
        assert version == nvml.nvmlMemory_v2
        return types.SimpleNamespace(used=USED, total=80_000 * MIB, reserved=RESERVE)

    def handle(uuid: str) -> str:
        if uuid not in uuids:
            raise NotFound("Not Found")
        return uuid

    def unsupported(*_: Any) -> Any:
        raise NVMLError("Not Supported")

    answers: dict[str, Any] = {
        "NVMLError": NVMLError,
        "NVMLError_NotFound": NotFound,
        "NVML_CLOCK_SM": 1,
        "NVML_CLOCK_MEM": 2,
        "NVML_TEMPERATURE_GPU": 0,
        "nvmlMemory_v2": 33554472,
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: "570.1",
        "nvmlDeviceGetHandleByUUID": handle,
        "nvmlDeviceGetMemoryInfo": memory,
        "nvmlDeviceGetPowerUsage": lambda handle: 71_000,
        "nvmlDeviceGetComputeRunningProcesses": lambda handle: [1, 2],
    }
    names = ("TotalEnergyConsumption", "ClockInfo", "Temperature", "UtilizationRates", "EccMode", "MigMode")
    names += ("CurrentClocksThrottleReasons", "Name", "EnforcedPowerLimit", "MaxClockInfo")
    names += ("CurrPcieLinkGeneration", "CurrPcieLinkWidth")
    answers = {f"nvmlDeviceGet{name}": unsupported for name in names} | answers
    for name, answer in answers.items():
        setattr(nvml, name, answer)
    return nvml


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Install an NVML, and what CUDA says of device 0."""

    def installed(cuda_uuid: str = CARD, visible: str | None = None, **given: Any) -> None:
        monkeypatch.setitem(sys.modules, "pynvml", module(**given))
        properties = types.SimpleNamespace(uuid=cuda_uuid)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return installed


def test_used_memory_leaves_the_drivers_reserve_out(install: Any) -> None:
    install()
    sensor = NvmlSensor(0, names_of(0))
    assert sensor.sample() == [{"device": 0, "power_w": 71.0, "memory_used_bytes": USED, "processes": 2}]
    assert sensor.describe()["idle_memory_bytes"] == USED


def test_an_old_driver_counts_by_version_1_throughout(install: Any) -> None:
    """Idle and the samples are of one counter, whichever it is: their difference is what was taken."""
    install(second_version=False)
    sensor = NvmlSensor(0, names_of(0))
    assert sensor.sample()[0]["memory_used_bytes"] == sensor.describe()["idle_memory_bytes"] == USED + RESERVE


def test_what_the_driver_does_not_offer_is_left_out(install: Any) -> None:
    install()
    assert NvmlSensor(0, names_of(0)).describe() == {
        "driver": "570.1",
        "memory_bytes": 80_000 * MIB,
        "idle_power_w": 71.0,
        "idle_memory_bytes": USED,
        "processes": 2,
    }


def test_a_card_is_found_by_its_uuid(install: Any) -> None:
    install(uuids=(f"GPU-{CARD}", f"MIG-{SLICE}"))
    assert NvmlSensor(0, names_of(0))._handle == f"GPU-{CARD}"


def test_a_slice_is_found_by_its_own_uuid(install: Any) -> None:
    """CUDA says the slice's, which NVML does not know as a card's."""
    install(cuda_uuid=SLICE, uuids=(f"GPU-{CARD}", f"MIG-{SLICE}"))
    assert NvmlSensor(0, names_of(0))._handle == f"MIG-{SLICE}"


def test_a_slice_is_found_where_cuda_says_its_cards_uuid(install: Any) -> None:
    install(cuda_uuid=CARD, visible=f"MIG-{SLICE}", uuids=(f"GPU-{CARD}", f"MIG-{SLICE}"))
    assert NvmlSensor(0, names_of(0))._handle == f"MIG-{SLICE}"


def test_a_card_that_nvml_does_not_know_is_an_error_that_says_so(install: Any) -> None:
    install(uuids=())
    with pytest.raises(RuntimeError, match="NVML does not answer: Not Found"):
        NvmlSensor(0, names_of(0))


def test_the_card_is_described_without_touching_it(install: Any) -> None:
    from dataclasses import replace

    from backbench.backends.interface.device import cpu

    install()
    card = replace(cpu(), vendor="nvidia", torch_device=torch.device("cuda", 0))
    assert describe_accelerator(card)["processes"] == 2
    assert describe_accelerator(cpu()) == {}
