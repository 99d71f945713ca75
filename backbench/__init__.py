"""Backbench: compare LLM inference kernels under real traffic.

    import backbench

    run = backbench.load("runs/A")       # run.requests, run.steps, run.telemetry, run.metrics, run.record
    backbench.compare(["runs/A", "runs/B"])

Every name is imported when it is used: `load` and `compare` need no torch. docs/notebook.md shows more.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from backbench.backends.interface import Backend as Backend
    from backbench.harness.subjects.target import Target as Target
    from backbench.reports.loaded import LoadedRun as LoadedRun
    from backbench.reports.loaded import compare as compare
    from backbench.reports.loaded import load as load

_HOMES = {
    "load": "backbench.reports.loaded",
    "compare": "backbench.reports.loaded",
    "LoadedRun": "backbench.reports.loaded",
    "Backend": "backbench.backends.interface",
    "Target": "backbench.harness.subjects.target",
}

__all__ = ["Backend", "LoadedRun", "Target", "compare", "load", "run"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'backbench' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def run(**options: Any) -> list[LoadedRun]:
    """Run one experiment and load what it wrote; `options` are those of `bench run`, without the dashes.

    One run, or as many as `repeat` says; docs/command-line.md names the options. Raises what ended the last
    one, as `bench run` does; the directory of an interrupted or failed run is kept.
    """
    from backbench.harness.experiment import Observer
    from backbench.harness.experiment import run as run_experiment
    from backbench.harness.options import run_options
    from backbench.reports.loaded import load

    outcomes = run_experiment(run_options(options), Observer())
    if outcomes and outcomes[-1].failure is not None:
        raise outcomes[-1].failure
    return [load(outcome.directory.path) for outcome in outcomes]
