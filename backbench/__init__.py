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
    from backbench.reports.loaded import LoadedBundle as LoadedBundle
    from backbench.reports.loaded import LoadedExperiment as LoadedExperiment
    from backbench.reports.loaded import LoadedRun as LoadedRun
    from backbench.reports.loaded import compare as compare
    from backbench.reports.loaded import load as load

_HOMES = {
    "load": "backbench.reports.loaded",
    "compare": "backbench.reports.loaded",
    "LoadedBundle": "backbench.reports.loaded",
    "LoadedExperiment": "backbench.reports.loaded",
    "LoadedRun": "backbench.reports.loaded",
    "Backend": "backbench.backends.interface",
    "Target": "backbench.harness.subjects.target",
}

__all__ = ["Backend", "LoadedBundle", "LoadedExperiment", "LoadedRun", "Target", "compare", "load", "run"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'backbench' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def run(**options: Any) -> list[LoadedRun]:
    """Run one experiment and load what it wrote; `options` are those of `bench run`, without the dashes.

    One run; with `repeat` or several backends as many as were asked for, each in a process of its own; with
    `find_load` every probe.
    Raises what ended the last one, as `bench run` does; the directory of an interrupted or failed run is
    kept.
    """
    from backbench.errors import INTERRUPTED
    from backbench.harness.experiment import Observer
    from backbench.harness.experiment import run as run_experiment
    from backbench.harness.options import run_options
    from backbench.harness.repeats import is_series, run_repeats
    from backbench.reports.loaded import load_run

    asked = run_options(options)
    if asked.find_load:
        from backbench.harness.load_search import find_load
        from backbench.harness.subjects.engine import EngineSubject

        search = find_load(asked, Observer(), EngineSubject).search
        return [load_run(search.path / probe.run) for probe in search.probes]
    if is_series(asked):
        done = run_repeats(asked, lambda text: None)
        if done.code == INTERRUPTED:
            raise KeyboardInterrupt
        return [load_run(done.experiment.directory(each).path) for each in done.experiment.runs]
    outcome = run_experiment(asked, Observer())
    if outcome.failure is not None:
        raise outcome.failure
    return [load_run(outcome.directory.path)]
