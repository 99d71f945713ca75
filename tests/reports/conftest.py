"""Gives the tests of reports/ their synthetic runs."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from backbench.reports.record import RunDirectory


def _load_fixtures() -> ModuleType:
    """tests/ holds no packages, so the builder next door is loaded by its path."""
    path = Path(__file__).with_name("record_fixtures.py")
    spec = importlib.util.spec_from_file_location("record_fixtures", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def synthetic() -> ModuleType:
    """The module record_fixtures."""
    return _load_fixtures()


@pytest.fixture(scope="session")
def make_run(synthetic: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunDirectory]:
    """make_run(machine="CPU", backend="torch", ...) writes a run directory."""

    def make(machine: str = "CPU", backend: str = "torch", **options: object) -> RunDirectory:
        path = tmp_path_factory.mktemp("runs") / f"{machine}-{backend}"
        directory: RunDirectory = synthetic.write_run(path, getattr(synthetic, machine), backend, **options)
        return directory

    return make


@pytest.fixture(scope="session")
def cpu_run(make_run: Callable[..., RunDirectory]) -> RunDirectory:
    return make_run()


@pytest.fixture(scope="session")
def gpu_runs(make_run: Callable[..., RunDirectory]) -> list[RunDirectory]:
    """torch and triton on one modelled NVIDIA card, triton on a modelled AMD one."""
    return [
        make_run("NVIDIA", "torch"),
        make_run("NVIDIA", "triton", seed=2),
        make_run("AMD", "triton", seed=3),
    ]
