"""One pair of runs: its values, and why it may not count."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from backbench.harness.gate.arms import BASELINE, CANDIDATE
from backbench.harness.gate.fingerprint import Fingerprint, at, fingerprint
from backbench.harness.gate.outcome import Pair
from backbench.harness.gate.policy import METRICS, Policy
from backbench.reports.metrics.validity import NOT_ASKED_FOR, UNCHECKED
from backbench.reports.record import RunDirectory, RunRecord

SAME = (
    "schema_version",
    "metrics.schema",
    "workload.content_hash",
    "metrics.prompt_tokens",
    "metrics.output_tokens",
)
"""What both runs of a pair must share to be one observation, beside the fingerprint's hard keys."""
CLOCKS_AGREE = 0.02
"""Clocks of the arms that differ by more make the card, not the code, the difference."""


@dataclass(frozen=True)
class Observation:
    """What a gate looks at of one run."""

    record: RunRecord
    clock_mhz: float | None = None
    """The GPU's median SM clock during the run; None = not sampled."""

    @classmethod
    def read(cls, directory: RunDirectory) -> Observation:
        """Raises ReportError where the directory holds no whole run."""
        telemetry = directory.read_telemetry()
        during = telemetry[(telemetry["time_ns"] >= 0) & (telemetry["device"] >= 0)]
        clocks = during["sm_clock_mhz"].dropna()
        return cls(directory.read_record(), float(clocks.median()) if len(clocks) else None)

    @property
    def finished(self) -> bool:
        """Whether the run came to its end, its check of results included where one was asked for."""
        found = self.record.correctness
        ended = found.get("passed") is not None or found.get("reason") == NOT_ASKED_FOR
        return self.record.run["status"] == "complete" and ended


def make_pair(
    index: int,
    seed: int,
    order: tuple[str, str],
    runs: Mapping[str, Observation],
    policy: Policy,
    check: bool = True,
) -> Pair:
    """The pair of these two runs, by arm; `check`: whether their results had to be checked."""
    baseline, candidate = runs[BASELINE].record, runs[CANDIDATE].record
    values = {}
    for name in {**policy.margins, **policy.floors}:
        before, after = METRICS[name].read(baseline), METRICS[name].read(candidate)
        if before is not None and after is not None:
            values[name] = (before, after)
    wrong = None
    if candidate.correctness.get("passed") is False:
        wrong = str(candidate.correctness.get("reason", "log-probabilities differ from the torch backend's"))
    checked = all(run.record.correctness.get("passed") is True for run in runs.values())
    return Pair(index, seed, order, values, tuple(_void(runs, check)), wrong, checked)


def incomparable(runs: Mapping[str, Observation], first: Fingerprint) -> str | None:
    """The hard key in which one of the runs is not like the gate's first run, in words."""
    for arm, run in runs.items():
        if (difference := first.against(fingerprint(run.record))) is not None:
            return f"{arm}: {difference}"
    return None


def _void(runs: Mapping[str, Observation], check: bool) -> Iterator[str]:
    for arm, run in runs.items():
        if run.record.run["status"] != "complete":
            yield f"the {arm} run was {run.record.run['status']}"
        for reason in run.record.validity:
            if check or reason != UNCHECKED:
                yield f"{arm}: {reason}"
    baseline, candidate = runs[BASELINE], runs[CANDIDATE]
    for key in SAME:
        before, after = at(baseline.record, key), at(candidate.record, key)
        if before != after:
            yield f"{key} differs: {before} vs {after}"
    clocks = [run.clock_mhz for run in (baseline, candidate) if run.clock_mhz is not None]
    if len(clocks) == 2 and max(clocks) > (1 + CLOCKS_AGREE) * min(clocks):
        yield f"the GPU's clocks differ: {clocks[0]:.0f} vs {clocks[1]:.0f} MHz"
