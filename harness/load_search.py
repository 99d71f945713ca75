"""The highest load at which service-level objectives hold: doubling, then bisection; one load of the model.

A probe is a run like any other, at one rate or concurrency. An objective such as ttft_p95 = 0.5 s holds where
the 95 % Wilson interval of the share of requests within 0.5 s lies above 95 %, and fails where it lies below.
Where it does neither, the requests were too few to tell, and the load is not shown to hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from backbench.errors import INTERRUPTED, HarnessError
from backbench.harness.experiment import Observer, Outcome
from backbench.harness.experiment import run as run_experiment
from backbench.harness.objectives import per_request
from backbench.harness.options import RunOptions
from backbench.harness.repeats import claim_experiment, is_series, remove_experiment
from backbench.harness.subjects.subject import Subject
from backbench.reports.metrics.requests import Context
from backbench.reports.metrics.run import RunTables
from backbench.reports.metrics.statistics import wilson, wilson_trials
from backbench.reports.metrics.throughput import met_and_due
from backbench.reports.metrics.window import most_in_flight
from backbench.reports.record.experiment import Experiment, Listed
from backbench.reports.record.search import FAILS, HOLDS, UNCLEAR, Limit, Probe, Search
from backbench.workloads.request import Workload

FIRST_RATE = 4.0
WITHIN = 0.05
"""The search ends when the load that holds and the one that does not differ by this."""
MOST_DOUBLINGS = 16
FEWEST_REQUESTS = 200
"""A probe's requests where nothing is said: enough for a p95 to fail or hold by a wide margin only."""
TURNS = 8
"""A closed loop's probe has this many requests a slot, so that its ends weigh little."""


@dataclass(frozen=True)
class Found:
    """A search as it ended."""

    search: Search
    code: int
    """0, or INTERRUPTED."""


class LoadedOnce:
    """A subject for many runs: prepared by the first of them (again where its check gave back what was
    loaded), its results checked by the first that asks."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._prepared = False
        self._known: dict[str, dict[str, Any]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._subject, name)

    def prepare(self, workload: Workload, stage: Callable[[str], None]) -> None:
        if not (self._prepared and self._subject.loaded):
            self._subject.prepare(workload, stage)
        self._prepared = True

    def check(self, workload: Workload) -> dict[str, Any]:
        return self._once("check", lambda: self._subject.check(workload))

    def accuracy(self) -> dict[str, Any]:
        return self._once("accuracy", self._subject.accuracy)

    def _once(self, what: str, ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if what not in self._known:
            self._known[what] = ask()
        return self._known[what]


def limits_of(slo_s: Mapping[str, float]) -> tuple[Limit, ...]:
    """{"ttft_p95": 0.5} as limits; HarnessError where one names no percentile."""
    found = []
    for name, limit_s in slo_s.items():
        quantity, _, percent = name.partition("_p")
        if not percent:
            raise HarnessError(
                f"--find-load needs a percentile of {name}; write --slo {name}_p95={limit_s:g}."
            )
        found.append(Limit(quantity, float(percent) / 100, limit_s))
    if not found:
        raise HarnessError("--find-load needs limits that hold or not; give --slo, such as ttft_p95=0.5.")
    return tuple(found)


def find_load(options: RunOptions, observer: Observer, subject: Callable[[RunOptions], Subject]) -> Found:
    """Probe loads until the highest that holds is known to within 5 %; every probe is kept.

    A rate is searched from --rate on, or FIRST_RATE, a concurrency from --concurrency on.

    Raises:
        HarnessError: the options conflict, or a probe could not be run.
    """
    limits = limits_of(options.slo_s)
    _require_single(options)
    needed = max(wilson_trials(each.level) for each in limits)
    fewest = options.load.get("num_requests") or max(FEWEST_REQUESTS, needed)
    if fewest < needed:
        raise HarnessError(
            f"{fewest} requests a probe cannot show that the limits hold; give -n {needed} or more."
        )
    varied = "concurrency" if "concurrency" in options.load else "rate"
    loaded = LoadedOnce(subject(options))
    experiment = Experiment(claim_experiment(options), (), 1, options.command)
    search = Search(experiment.path, varied, limits)
    probes = _Probes(options, observer, loaded, fewest, search, experiment)
    try:
        start = options.load.get(varied, FIRST_RATE)
        highest(probes.holds, start, varied == "concurrency", lambda: probes.together)
    except KeyboardInterrupt:
        return Found(probes.search, INTERRUPTED)
    finally:
        if not probes.search.probes:
            remove_experiment(experiment)
    return Found(probes.search, 0)


def highest(
    holds: Callable[[float], bool],
    start: float,
    whole: bool,
    lower: Callable[[], bool] = lambda: True,
    within: float = WITHIN,
) -> tuple[float | None, float | None]:
    """(The highest load that holds, the lowest that does not), None where none was met.

    Doubles from `start` while it holds, halves while it does not, then bisects: in the middle of the
    logarithm, or of whole numbers (`whole`). Right where what holds at a load holds at all lower ones.
    `lower` says after a load that does not hold whether less could help.
    """
    low: float | None = None
    high: float | None = None
    load = start
    for _ in range(MOST_DOUBLINGS):
        if holds(load):
            low = load
        else:
            high = load
        if (low is not None and high is not None) or (low is None and not lower()):
            break
        load = low * 2 if low is not None else load / 2
        if whole:
            load = math.floor(load)
            if load < 1:
                break
    while low is not None and high is not None and high > low * (1 + within):
        load = (low + high) // 2 if whole else math.sqrt(low * high)
        if load == low:
            break
        if holds(load):
            low = load
        else:
            high = load
    return low, high


def judged(met: Mapping[str, tuple[int, int]], limits: tuple[Limit, ...]) -> tuple[str, str]:
    """The verdict on these counts, and of an unclear one why."""
    verdicts = []
    for each in limits:
        count, due = met[each.name]
        low, high = wilson(count, due)
        if low >= each.level:
            continue
        if high < each.level:
            return FAILS, ""
        verdicts.append(f"{each.name}: {count} of {due} requests met it, too few to tell")
    return (UNCLEAR, "; ".join(verdicts)) if verdicts else (HOLDS, "")


class _Probes:
    """The runs of one search, and what they found so far."""

    def __init__(
        self,
        options: RunOptions,
        observer: Observer,
        subject: LoadedOnce,
        fewest: int,
        search: Search,
        experiment: Experiment,
    ) -> None:
        self.search = search
        self.together = True
        """In the last probe requests met in the target; where each was alone, less load changes nothing."""
        self._options = options
        self._observer = observer
        self._subject = subject
        self._fewest = fewest
        self._experiment = experiment

    def holds(self, load: float) -> bool:
        """Run one probe, keep it, and say whether every limit is shown to hold."""
        number = len(self.search.probes) + 1
        name = f"{number:02d}-{self.search.varied}-{load:.6g}"
        self._observer.stage(f"Probe {number}: {self.search.words(load)}")
        asked = self._of(load, self.search.path / name)
        outcome = run_experiment(asked, self._observer, lambda _: cast(Subject, self._subject))
        if outcome.failure is not None:
            raise outcome.failure
        if outcome.record.run["status"] != "complete":
            raise KeyboardInterrupt
        probe = self._judge(outcome, name, load)
        self.search = self.search.with_probe(probe)
        arms = (*self._experiment.arms, self.search.words(load))
        listed = Listed(name, arms[-1], number - 1, self._options.seed, str(outcome.record.run["uuid"]))
        self._experiment = replace(self._experiment, arms=arms).with_run(listed)
        self.write()
        self._observer.stage(f"{self.search.words(load)} {probe.verdict}")
        return probe.verdict == HOLDS

    def write(self) -> None:
        """Both files, as far as the search is."""
        self._experiment.write()
        self.search.write()

    def _judge(self, outcome: Outcome, name: str, load: float) -> Probe:
        directory = outcome.directory
        context = Context.from_dict(outcome.record.metrics["context"])
        rows = RunTables.read(directory.read_requests(), directory.read_steps(), context).rows
        self.together = most_in_flight(rows) > 1
        limits = self.search.limits
        met = {each.name: met_and_due(rows, each.quantity, each.limit_s) for each in limits}
        verdict, why = judged(met, limits)
        if verdict == HOLDS and outcome.record.schedule["client_saturated"]:
            verdict, why = UNCLEAR, "the client was saturated and offered less"
        return Probe(name, load, met, verdict, why)

    def _of(self, load: float, out: Path) -> RunOptions:
        """The options of one probe: long enough for a queue to show."""
        options = self._options
        varied = self.search.varied
        value = load if varied == "rate" else int(load)
        least = TURNS * load if varied == "concurrency" else load * options.probe_seconds
        offered = {varied: value, "num_requests": max(self._fewest, math.ceil(least))}
        return replace(
            options,
            find_load=False,
            slo_s=per_request(options.slo_s),
            out=out,
            load=options.load | offered,
        )


def _require_single(options: RunOptions) -> None:
    if is_series(options):
        raise HarnessError("--find-load searches with one backend and scheme, and repeats nothing itself.")
    fixed = {"time_scale": "--time-scale", "all_at_once": "--all-at-once"}
    for name, typed in fixed.items():
        if options.load.get(name):
            raise HarnessError(f"{typed} fixes the load that --find-load searches; leave one of them out.")
