"""pytest-benchmark's JSON, for its `compare`: https://pytest-benchmark.readthedocs.io

Its rounds are seconds, so it takes the quantities that are times. A round is a run: what a run's requests
differ by is no spread of the benchmark.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from backbench.reports.arms import Arm, compared_in
from backbench.reports.export.format import Export
from backbench.reports.limits import names_of

VERSION = "5.0.0"
"""The version of pytest-benchmark whose fields these are."""


def write(arms: Sequence[Arm]) -> dict[str, Any]:
    """A benchmark an arm and time, grouped by the time; machine and commit are the first arm's."""
    first = arms[0].records[0]
    software = first.software
    benchmarks = []
    for arm in arms:
        for each in compared_in([arm]):
            rounds = np.array([*arm.values(each).values()])
            if each.unit != "s" or not len(rounds) or rounds.min() <= 0:
                continue
            name = names_of(each)[1]
            benchmarks.append(
                {
                    "group": name,
                    "name": f"{name}[{arm.label}]",
                    "fullname": f"{first.workload.get('name')}::{name}[{arm.label}]",
                    "params": {"arm": arm.label},
                    "param": arm.label,
                    "extra_info": {"label": each.label, "definition": each.definition},
                    "options": {"min_rounds": len(rounds), "timer": "perf_counter", "warmup": True},
                    "stats": _statistics(rounds),
                }
            )
    cpu = first.system.get("cpu") or {}
    return {
        "": {
            "machine_info": {
                "node": "",
                "processor": str(cpu.get("name", "")),
                "machine": str(cpu.get("arch", "")),
                "system": str(first.system.get("os", "")),
                "python_version": str(software.get("python", "")),
                "device": first.system.get("device"),
            },
            "commit_info": {"id": software.get("git_sha"), "dirty": software.get("git_dirty")},
            "benchmarks": benchmarks,
            "datetime": first.run.get("utc"),
            "version": VERSION,
        }
    }


def _statistics(rounds: np.ndarray) -> dict[str, Any]:
    """The fields of pytest-benchmark's `Stats`; quartiles are numpy's, fences Tukey's."""
    ordered = np.sort(rounds)
    mean, spread = ordered.mean(), ordered.std(ddof=1) if len(ordered) > 1 else 0.0
    low, middle, high = np.quantile(ordered, [0.25, 0.5, 0.75])
    reach = 1.5 * (high - low)
    inside = ordered[(ordered >= low - reach) & (ordered <= high + reach)]
    beyond = int((abs(ordered - mean) > spread).sum())
    return {
        "min": ordered[0],
        "max": ordered[-1],
        "mean": mean,
        "stddev": spread,
        "rounds": len(ordered),
        "median": middle,
        "iqr": high - low,
        "q1": low,
        "q3": high,
        "iqr_outliers": len(ordered) - len(inside),
        "stddev_outliers": beyond,
        "outliers": f"{beyond};{len(ordered) - len(inside)}",
        "ld15iqr": inside[0],
        "hd15iqr": inside[-1],
        "ops": 1 / mean,
        "total": ordered.sum(),
        "data": list(rounds),
        "iterations": 1,
    }


EXPORT = Export("pytest-benchmark", "The times, a round a run, for `pytest-benchmark compare FILE`.", write)
