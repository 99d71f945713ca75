"""Detection: the CPU here, GPUs through a stand-in for torch's properties."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from backbench.backends.interface.device import detect, gpu
from backbench.errors import BackendError

PROPERTIES = SimpleNamespace(
    name="Some GPU",
    major=9,
    minor=0,
    gcnArchName="gfx942:sramecc+:xnack-",
    multi_processor_count=132,
    total_memory=1 << 37,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
)


def test_cpu():
    device = detect(prefer="cpu")
    assert (device.vendor, device.torch_device.type, device.interpret) == ("cpu", "cpu", False)
    assert device.units >= 1 and device.memory_bytes > 1 << 20 and device.name


def test_interpreter_runs_on_the_cpu():
    device = detect(interpret=True)
    assert device.interpret and device.torch_device.type == "cpu"
    with pytest.raises(BackendError, match="interpreter runs on the CPU"):
        detect(interpret=True, prefer="cuda")


@pytest.mark.parametrize("name", ["gpu", "xpu", "cuda:x"])
def test_unknown_devices_are_one_line(name):
    with pytest.raises(BackendError, match=f"Unknown device '{name}'; use cpu, cuda or cuda:N"):
        detect(prefer=name)


def test_a_missing_gpu_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match="torch sees 0 GPUs"):
        detect(prefer="cuda")


@pytest.mark.parametrize(("hip", "expected"), [(None, ("nvidia", "sm90")), ("7.0", ("amd", "gfx942"))])
def test_gpu(monkeypatch, hip, expected):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: PROPERTIES)
    monkeypatch.setattr(torch.version, "hip", hip)
    device = gpu(1)
    assert (device.vendor, device.arch) == expected
    assert (device.units, device.shared_bytes, device.torch_device.index) == (132, 232448, 1)
