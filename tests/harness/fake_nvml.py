"""An NVML as a module that child processes import: a card that draws 100 W, says its energy, and no more."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path

import pytest

NVML = """
    import time

    class NVMLError(Exception): pass
    class NVMLError_NotFound(NVMLError): pass
    NVML_CLOCK_SM = NVML_CLOCK_MEM = NVML_TEMPERATURE_GPU = nvmlMemory_v2 = 0
    began = time.perf_counter()

    def nvmlInit(): pass
    def nvmlShutdown(): pass
    def nvmlDeviceGetHandleByUUID(uuid):
        if uuid != "GPU-1":
            raise NVMLError_NotFound("Not Found")
        return uuid
    def nvmlDeviceGetPowerUsage(handle): return 100_000
    def nvmlDeviceGetTotalEnergyConsumption(handle): return int(1e5 * (time.perf_counter() - began))
    def __getattr__(name):
        if not name.startswith("nvml"):
            raise AttributeError(name)
        def unsupported(*_, **__):
            raise NVMLError("Not Supported")
        return unsupported
"""


def put_before_others(name: str, text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have child processes import this module of that name, in place of any other."""
    (folder / f"{name}.py").write_text(textwrap.dedent(text))
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
