"""A candidate against runs that were stored on another day: cheap, for every night, and proof of nothing.

What a machine does differently from day to day (its clocks, its neighbours, its driver) lies in the
difference. So a loss only asks for a gate of pairs; nothing here ever says "regressed", but for a floor.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import exp
from pathlib import Path

from backbench.errors import HarnessError, shown
from backbench.harness.gate.arms import Arm, MeasureRun
from backbench.harness.gate.decision import Verdict
from backbench.harness.gate.floors import broken_floors
from backbench.harness.gate.outcome import Pair
from backbench.harness.gate.policy import Policy
from backbench.harness.gate.session import Budget, End, Session, differences
from backbench.harness.provenance import redact
from backbench.reports.metrics.between_runs import hodges_lehmann
from backbench.reports.record import RECORD_FILE, RunDirectory
from backbench.reports.record.experiment import EXPERIMENT_FILE, read_experiment

MOST_RUNS = 5
"""Stored runs that are looked at: a night's budget is short, and more do not make them of today."""

Stored = Mapping[int, RunDirectory]
"""Runs by seed, oldest first."""


def find_stored(name: str, text: str) -> Stored | None:
    """The runs at this path, where it is a run's or an experiment's directory.

    Raises:
        HarnessError: an experiment of several arms, or without a finished run.
        ReportError: a record that cannot be read.
    """
    path = Path(text)
    if text.lstrip().startswith("-") or not text.strip():
        return None
    if (path / RECORD_FILE).is_file():
        found = [RunDirectory.open(path)]
    elif (path / EXPERIMENT_FILE).is_file():
        experiment = read_experiment(path)
        if len(arms := {listed.arm for listed in experiment.runs}) != 1:
            held = "no finished run" if not arms else f"runs of {len(arms)} arms"
            raise HarnessError(f"--{name} {shown(text)} holds {held}; name an experiment of one.")
        found = [experiment.directory(listed) for listed in experiment.runs]
    else:
        return None
    return {int(each.read_record().run["seed"]): each for each in found[:MOST_RUNS]}


def stored_arm(name: str, text: str, runs: Stored) -> Arm:
    """The arm that these runs were of."""
    record = next(iter(runs.values())).read_record()
    said = f"{Path(text).resolve().name} of {record.run.get('utc', 'an unknown day')}"
    code = None if record.software.get("git_dirty") else record.software.get("git_sha")
    return Arm(name, code=code, stored=redact(said))


def common_seeds(stored: Mapping[str, Stored]) -> list[int]:
    """Of the runs that every stored arm has; HarnessError where there are none."""
    first, *others = stored.values()
    seeds = [seed for seed in first if all(seed in other for other in others)]
    if not seeds:
        raise HarnessError("The stored runs have no seed in common; run both with the same --seed.")
    return seeds


def paired_again(before: Arm, after: str, policy_file: Path | None) -> str:
    """The command of the gate of pairs; REF stands for code that no commit names."""
    command = ["bench", "gate", "--baseline", (before.code or "REF")[:12], "--candidate", after]
    return shlex.join(command + (["--policy", str(policy_file)] if policy_file else []))


def replaying(measure: MeasureRun, stored: Mapping[str, Stored]) -> MeasureRun:
    """As `measure`, but for arms whose runs are stored: of those the one with the seed."""

    def found(arm: Arm, policy: Policy, seed: int, out: Path) -> RunDirectory:
        if arm.name not in stored:
            return measure(arm, policy, seed, out)
        out.symlink_to(stored[arm.name][seed].path.resolve())
        return RunDirectory.open(out)

    return found


@dataclass
class StoredSession(Session):
    """A gate whose baseline, or both of whose arms, are stored runs."""

    seeds: Sequence[int] = field(kw_only=True)
    """Of the stored runs, one a pair."""
    again: str = field(kw_only=True)
    """The gate of pairs that a loss asks for, as typed."""

    def _seed(self, index: int) -> int:
        return self.seeds[index]

    def _order(self, pairs: Sequence[Pair]) -> tuple[Arm, Arm]:
        return self.baseline, self.candidate

    def _end(self, pairs: list[Pair], budget: Budget) -> End | None:
        valid = [pair for pair in pairs if not pair.void]
        if any(pair.wrong for pair in pairs):
            return End(Verdict.REGRESSED)
        if self.differs is not None:
            return End(Verdict.INVALID, self.differs)
        if broken := broken_floors(self.policy, valid):
            return End(Verdict.REGRESSED, "", (), broken)
        if len(pairs) < len(self.seeds) and not (pairs and budget.spent):
            return None
        if not valid:
            return End(Verdict.INVALID, f"no pair counts: {pairs[-1].void[0]}")
        return self._seen(valid)

    def _seen(self, valid: Sequence[Pair]) -> End:
        """What the valid pairs show, in words."""
        measured = [name for name in self.names(valid) if all(pair.compares(name) for pair in valid)]
        if not measured:
            return End(Verdict.INVALID, "no gated metric was measured")
        worse, said = False, []
        for name in measured:
            loss = exp(hodges_lehmann(differences(valid, name))) - 1
            margin = self.policy.margin(name, valid[0].values[name][0])
            worse |= loss >= margin
            said.append(f"{name} {abs(loss):.1%} {'worse' if loss > 0 else 'better'} (margin {margin:.0%})")
        figures = f"{', '.join(said)}, n = {len(valid)} against stored runs"
        if worse:
            return End(Verdict.INCONCLUSIVE, f"{figures}; other days differ, so judge by pairs: {self.again}")
        return End(Verdict.PASS, f"no loss seen: {figures}; this judges no code, pairs do")
