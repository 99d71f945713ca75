"""What a comparison compares: one arm a configuration, each a sample of runs. The sample is the run.

An arm of one run has no spread between runs, so nothing is called better or worse by it. Arms of one
experiment ran in turns on the same requests: a block's runs are a pair, and ratios are of pairs. A run that
is not valid counts for no verdict, and neither does its pair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import exp
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from backbench.errors import ReportError
from backbench.reports.compare import Difference, Ratio, differences, incomparable, labels
from backbench.reports.metrics.between_runs import (
    CHANCE,
    MOST_PAIRS,
    Estimate,
    difference,
    difference_p,
    student_reach,
    typical,
    welch,
    welch_p,
)
from backbench.reports.metrics.metric import Quantity
from backbench.reports.quantities import QUANTITIES, Reading, quantity, read
from backbench.reports.record import RunDirectory, RunRecord
from backbench.reports.record.bundle import expand
from backbench.reports.record.experiment import is_experiment, read_experiment

Read = Callable[[Path], tuple[RunDirectory, RunRecord]]
Turn = tuple[Path | None, int]
"""The experiment and block of a run; of a run of its own, None and its place among its arm's."""


@dataclass(frozen=True)
class Run:
    """One run of an arm."""

    record: RunRecord
    block: int = 0
    """Runs of one block of one experiment replayed the same requests next to each other."""
    directory: RunDirectory | None = None
    experiment: Path | None = None
    """Where it took turns, of an arm that was pooled from several experiments."""

    @property
    def left_out(self) -> str | None:
        """Why no verdict rests on it; None = it counts."""
        status = self.record.run["status"]
        reasons = [*self.record.validity, *([f"it was {status}"] if status != "complete" else [])]
        more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        return reasons[0] + more if reasons else None


@dataclass(frozen=True)
class Arm:
    """One configuration and the runs that measured it."""

    label: str
    runs: tuple[Run, ...]
    experiment: Path | None = None
    """The directory of the experiment whose arms ran in turns; None = a run of its own, or several pooled."""

    @property
    def records(self) -> list[RunRecord]:
        return [run.record for run in self.runs]

    @property
    def counted(self) -> tuple[Run, ...]:
        """The runs that a verdict may rest on."""
        return tuple(run for run in self.runs if run.left_out is None)

    @property
    def shown(self) -> tuple[Run, ...]:
        """The runs that values are of: those that count, or all where none does."""
        return self.counted or self.runs

    @property
    def representative(self) -> Run:
        """The run in the middle by output throughput: what is drawn where one run has to stand for all."""
        rate = quantity("metrics", "output_tokens_per_s", "whole_run")
        ordered = sorted(self.shown, key=lambda run: read(run.record, rate).value or 0.0)
        return ordered[(len(ordered) - 1) // 2]

    def turns(self) -> dict[Turn, Run]:
        """The runs by when they took their turn."""
        found: dict[Turn, Run] = {}
        for place, run in enumerate(self.runs):
            experiment = run.experiment or self.experiment
            found[experiment, place if experiment is None else run.block] = run
        return found

    def values(self, wanted: Quantity) -> dict[Turn, float]:
        """Turn -> the quantity there, of the runs shown that have it."""
        shown = {id(run) for run in self.shown}
        found = {
            turn: read(run.record, wanted).value for turn, run in self.turns().items() if id(run) in shown
        }
        return {turn: value for turn, value in found.items() if value is not None}


def arm_of(record: RunRecord, label: str) -> Arm:
    """The arm of a single run."""
    return Arm(label, (Run(record),))


def arms_of(records: Sequence[RunRecord]) -> list[Arm]:
    """One arm a record."""
    return [arm_of(record, label) for record, label in zip(records, labels(records), strict=True)]


def open_run(path: Path) -> tuple[RunDirectory, RunRecord]:
    """The run directory at `path` and its record."""
    directory = RunDirectory.open(path)
    return directory, directory.read_record()


def open_arms(paths: Sequence[Path], read_run: Read = open_run) -> list[Arm]:
    """The arms of run and experiment directories and bundles, in order, each with a distinct short label.

    Raises:
        ReportError: one cannot be read.
    """
    paths = [each for path in paths for each in expand(path)]
    found = []
    for path in paths:
        if not is_experiment(path):
            directory, record = read_run(path)
            found.append(Arm("", (Run(record, 0, directory),)))
            continue
        experiment = read_experiment(path)
        for name in experiment.arms:
            listed = [run for run in experiment.runs if run.arm == name]
            opened = [(each.block, *read_run(experiment.path / each.path)) for each in listed]
            runs = tuple(Run(record, block, directory) for block, directory, record in opened)
            if runs:
                found.append(Arm(name, runs, experiment.path))
    if len(paths) == 1 and is_experiment(paths[0]):
        if not found:
            raise ReportError(f"{paths[0]} lists no finished run.")
        return found  # its arms' names are distinct, and its user's
    names = labels([arm.runs[0].record for arm in found])
    return [replace(arm, label=name) for arm, name in zip(found, names, strict=True)]


def measured(arm: Arm, wanted: Quantity) -> Reading:
    """A single run's value with its interval within the run; else the median with that between runs.

    Runs that are not valid are left out, unless none is.
    """
    values = list(arm.values(wanted).values())
    if len(arm.runs) == 1 or not values:
        return read(arm.runs[0].record, wanted)
    low = high = None
    if min(values) > 0 and len(set(values)) > 1:
        estimate = typical(np.array(values))
        low, high = estimate.low, estimate.high
    return Reading(median(values), low, high)


def against(reference: Arm, candidate: Arm, wanted: Quantity) -> Ratio:
    """candidate / reference: better or worse only where an interval between runs leaves 1 out and equal arms
    would differ so much by `CHANCE` alone.

    Arms of one experiment are paired by block. Arms of several runs on different machines cannot take
    turns and get Welch's interval; on one machine the sessions' drift would be in it, so it says nothing.
    """
    before, after = reference.values(wanted), candidate.values(wanted)
    if not before or not after or median(before.values()) == 0:
        return Ratio(None, None, None, "")
    plain = median(after.values()) / median(before.values())
    unclear = "" if wanted.higher_is_better is None else "unclear"
    counted = min(len(reference.counted), len(candidate.counted))
    if min(*before.values(), *after.values(), 1.0) <= 0 or counted < 2:
        return Ratio(plain, None, None, unclear)
    if is_paired(reference, candidate):
        shared = [turn for turn in before if turn in after]
        if len(shared) < 2:
            return Ratio(plain, None, None, unclear)
        logs = np.log([after[turn] / before[turn] for turn in shared])
        found = _paired(logs)
        return _judged(found, difference_p(logs), wanted.higher_is_better)
    if min(len(before), len(after)) < 2:
        return Ratio(plain, None, None, unclear)
    first, second = np.log(list(before.values())), np.log(list(after.values()))
    ratio = _judged(_unpaired(first, second), welch_p(first, second), wanted.higher_is_better)
    apart = _machines(reference).isdisjoint(_machines(candidate))
    return ratio if apart else replace(ratio, verdict=unclear)


def is_paired(reference: Arm, candidate: Arm) -> bool:
    """Whether both ran in turns, in the same experiments."""
    return any(experiment for experiment, _ in reference.turns().keys() & candidate.turns().keys())


def _machines(arm: Arm) -> set[tuple[Any, ...]]:
    devices = [record.system.get("device") or {} for record in arm.records]
    return {tuple(device.get(key) for key in ("vendor", "arch", "name")) for device in devices}


def _paired(logs: np.ndarray) -> Estimate:
    """Of log ratios; beyond MOST_PAIRS, where the mean is as good as normal, Student's interval."""
    found = difference(logs) if len(logs) <= MOST_PAIRS else None
    if found is None:
        return typical(np.exp(logs))
    assert found.low is not None and found.high is not None
    return Estimate(exp(found.value), exp(found.low), exp(found.high), found.n)


def _unpaired(before: np.ndarray, after: np.ndarray) -> Estimate:
    """Welch's interval of the difference of mean logarithms."""
    middle = float(after.mean() - before.mean())
    error, freedom = welch(before, after)
    reach = student_reach(freedom) * error
    n = min(len(before), len(after))
    return Estimate(exp(middle), exp(middle - reach), exp(middle + reach), n)


def _judged(found: Estimate, p: float, higher_is_better: bool | None) -> Ratio:
    assert found.low is not None and found.high is not None
    if higher_is_better is None:
        verdict = ""
    elif p > CHANCE or found.low <= 1 <= found.high:
        verdict = "same"
    else:
        verdict = "better" if (found.value > 1) == higher_is_better else "worse"
    return Ratio(found.value, found.low, found.high, verdict, found.n)


def arms_incomparable(arms: Sequence[Arm]) -> list[Difference]:
    """`incomparable` of the runs that replayed the same draw; of the first ones where no seed is shared."""
    by_seed: list[dict[Any, list[RunRecord]]] = [{} for _ in arms]
    for arm, held in zip(arms, by_seed, strict=True):
        for record in arm.records:
            held.setdefault(record.run.get("seed"), []).append(record)
    shared = [seed for seed in by_seed[0] if all(seed in held for held in by_seed)]
    alike = [[record for held in by_seed for record in held[seed]] for seed in shared]
    found: dict[str, Difference] = {}
    for records in alike or [[arm.records[0] for arm in arms]]:
        for each in incomparable(records):
            found.setdefault(each.field, each)
    return list(found.values())


def require_comparable(arms: Sequence[Arm], found: Sequence[Difference] | None = None) -> None:
    """Raises:
    ReportError: fewer than two arms, or hard fields differ (`found`); the message names them all.
    """
    if len(arms) < 2:
        raise ReportError("A comparison needs at least two runs.")
    if found := arms_incomparable(arms) if found is None else found:
        raise ReportError("These runs do not compare: " + "; ".join(map(str, found)) + ".")


def arm_differences(arms: Sequence[Arm]) -> list[Difference]:
    """`differences` of the arms' first runs; the command of a run in an experiment is not its user's."""
    found = differences([arm.runs[0].record for arm in arms])
    typed = not any(experiment for arm in arms for experiment, _ in arm.turns())
    return [each for each in found if typed or each.field != "run.command"]


def compared_in(arms: Sequence[Arm]) -> list[Quantity]:
    """The quantities that at least one run has."""
    return [each for each in QUANTITIES if any(arm.values(each) for arm in arms)]
