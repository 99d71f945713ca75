"""Offline tuning: every candidate launch is checked, then timed, and the fastest becomes an entry.

Nothing here runs while serving; `bench tune` calls it.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import exp, inf, log

from backbench.backends.interface import Config, Problem
from backbench.backends.tuning.table import Entry
from backbench.errors import BackendError

WORTHWHILE = 0.98
"""A candidate replaces the baseline only below this share of its time: less is noise."""


@dataclass(frozen=True)
class Finding:
    """What a sweep of one bucket found. Times are geometric means over its shapes, in microseconds."""

    entry: Entry
    baseline_us: float
    best_us: float
    tried: int
    refused: tuple[str, ...]
    """One line for each launch that was impossible or gave a wrong result."""


Compiler = Callable[[Problem, Sequence[Config]], None]


def sweep(problem: Problem, compile_all: Compiler | None = None) -> Finding:
    """Check and time the baseline and every candidate; the fastest right one becomes the entry.

    Raises:
        BackendError: no launch at all gives a right result.
    """
    baseline = problem.baseline()
    candidates = [config for config in problem.candidates() if config != baseline]
    if compile_all is not None:
        compile_all(problem, [config for config in (baseline, *candidates) if config is not None])
    refused: list[str] = []
    baseline_us = _time_us(problem, baseline, refused)
    times = [(_time_us(problem, config, refused), config) for config in candidates]
    best_us, best = min(times, key=lambda found: found[0], default=(inf, None))
    if best_us >= WORTHWHILE * baseline_us:
        best_us, best = baseline_us, baseline
    if best_us == inf:
        raise BackendError(
            f"No launch of {problem.operation} {problem.bucket} gives a right result here: {refused[0]}."
        )
    key, sources = (problem.operation, problem.bucket, problem.dtype), problem.sources_of(best)
    dense_us = problem.dense_us()
    times_us = (None, None) if dense_us is None else (round(best_us, 2), round(dense_us, 2))
    entry = Entry(*key, sources, best, *times_us)
    return Finding(entry, baseline_us, best_us, 1 + len(candidates), tuple(refused))


def _time_us(problem: Problem, config: Config | None, refused: list[str]) -> float:
    """Geometric mean of the launch's times; infinite, with a line in `refused`, where it must not serve."""
    name = describe(config)
    try:
        error = 0.0 if config is None else problem.error(config)
        if not error < problem.tolerance:  # NaN too
            refused.append(f"{name}: relative error {error:.1e}")
            return inf
        times = problem.times_us(config)
    except Exception as fault:  # a launch that does not compile is an answer of the sweep
        lines = str(fault).split("\n")
        refused.append(f"{name}: {type(fault).__name__}: {lines[-1].strip()[:120]}")
        return inf
    return exp(sum(map(log, times)) / len(times))


def describe(config: Config | None) -> str:
    """A launch in one line."""
    if config is None:
        return "the library"
    return " ".join(f"{name}={value}" for name, value in config.items() if value not in (False, None))


@contextmanager
def parallel_compiler(workers: int) -> Iterator[Compiler]:
    """Compiles candidates in `workers` processes: Triton takes seconds for each."""
    # Ctrl-C is the parent's to answer; workers would only print stack traces.
    ignore = (signal.SIGINT, signal.SIG_IGN)
    with multiprocessing.get_context("spawn").Pool(workers, signal.signal, ignore) as pool:
        yield lambda problem, configs: _compile_all(pool.map, problem, configs)


def _compile_all(each: Callable[..., object], problem: Problem, configs: Sequence[Config]) -> None:
    each(partial(_compile, problem), configs)


def _compile(problem: Problem, config: Config) -> str:
    """What went wrong; the sweep meets the same error in its own process and reports it there."""
    try:
        problem.compile(config)
    except Exception as fault:
        return str(fault)
    return ""
