"""Running a gate: pairs in the order A B B A, looked at after 8, 12 and 16, kept on disk as they end."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from backbench.errors import HarnessError, ReportError, shown
from backbench.harness.gate.arms import Arm, MeasureRun, run_in_process, unchecked
from backbench.harness.gate.decision import LOOKS, Finding, Verdict, judge, overall
from backbench.harness.gate.fingerprint import Fingerprint, fingerprint
from backbench.harness.gate.floors import broken_floors
from backbench.harness.gate.outcome import Outcome, Pair, conclude
from backbench.harness.gate.pairs import Observation, incomparable, make_pair
from backbench.harness.gate.policy import Policy, gated
from backbench.harness.provenance import redacted
from backbench.reports.metrics.statistics import Floats
from backbench.reports.record import RunDirectory, digest_problems
from backbench.reports.record.experiment import Experiment, Listed

FEWEST_PAIRS = 6
"""Fewer cannot reject anything at 95 %."""
MOST_VOID = 8
"""Void pairs after which the machine is not fit to gate on ..."""
FIRST_VOID = 3
"""... or so many at the start, with no valid one: what voids them stays."""
PLAN_FILE = "plan.json"


@dataclass
class Budget:
    """Minutes that may be spent; a pair is begun only where the longest so far would still fit."""

    minutes: float | None = None
    started: float = field(default_factory=lambda: time.monotonic())
    longest_s: float = 0.0

    @property
    def spent(self) -> bool:
        if self.minutes is None:
            return False
        return time.monotonic() - self.started + self.longest_s > 60 * self.minutes

    @contextmanager
    def spending(self) -> Iterator[None]:
        before = time.monotonic()
        yield
        self.longest_s = max(self.longest_s, time.monotonic() - before)


@dataclass(frozen=True)
class End:
    """Why a gate wants no more pairs."""

    verdict: Verdict
    reason: str = ""
    """Empty = what the metrics say."""
    findings: Sequence[Finding] = ()
    floors: Sequence[str] = ()
    """Those that the candidate breaks, in words."""


@dataclass
class Session:
    """One gate in its directory; running it again goes on where it stopped."""

    policy: Policy
    baseline: Arm
    candidate: Arm
    out: Path
    measure: MeasureRun = run_in_process
    tell: Callable[[str], None] = print
    max_minutes: float | None = None
    blind: Callable[[Fingerprint], str | None] = lambda _: None
    """Why the machine with this fingerprint cannot see the policy's margins, where that is known."""
    fingerprint: Fingerprint | None = None
    """Of the first run."""
    differs: str | None = None
    """Why a later run is not comparable with it."""
    soft: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    """Arm -> what may differ between the arms, of its last run."""
    listed: list[Listed] = field(default_factory=list)
    """The runs of the valid pairs."""

    def run(self) -> Outcome:
        """Pairs until a look decides, the budget ends, or the pairs are no use."""
        pairs: list[Pair] = []
        budget = Budget(self.max_minutes)
        self.claim()
        while (end := self._end(pairs, budget)) is None:
            with budget.spending():
                pairs.append(self.next_pair(pairs))
        if self.listed:
            # So that show, verify, compare and report take the gate as the experiment that it is.
            arms, blocks = (self.baseline.name, self.candidate.name), len(self.listed) // 2
            Experiment(self.out, arms, blocks, "bench gate", tuple(self.listed)).write()
        return self._outcome(pairs, end)

    def _end(self, pairs: list[Pair], budget: Budget) -> End | None:
        """Why no more pairs are wanted, where that is so."""
        valid = [pair for pair in pairs if not pair.void]
        void = len(pairs) - len(valid)
        if any(pair.wrong for pair in pairs):
            return End(Verdict.REGRESSED)
        if self.differs is not None:
            return End(Verdict.INVALID, self.differs)
        if self.fingerprint is not None and (why := self.blind(self.fingerprint)) is not None:
            return End(Verdict.INVALID, why)
        if broken := broken_floors(self.policy, valid):
            return End(Verdict.REGRESSED, "", self.findings(valid), broken)
        if len(valid) in LOOKS:
            found = self.findings(valid)
            if not found:
                return End(Verdict.INVALID, "no gated metric was measured")
            if (verdict := overall(found)) is not Verdict.EXTEND:
                return End(verdict, "", found)
        if void >= (MOST_VOID if valid else FIRST_VOID):
            return End(Verdict.INVALID, f"{void} pairs were void: {pairs[-1].void[0]}", self.findings(valid))
        if budget.spent:
            return self._out_of_time(valid)
        return None

    def _out_of_time(self, valid: list[Pair]) -> End:
        """The end of the budget is the last look: when it comes does not depend on what was measured."""
        found = self.findings(valid)
        verdict = overall(found) if found else Verdict.EXTEND
        if verdict is not Verdict.EXTEND:
            return End(verdict, "", found)
        reason = f"{self.max_minutes:g} minutes were over after {len(valid)} valid pairs"
        return End(Verdict.INCONCLUSIVE, reason, found)

    def names(self, valid: Sequence[Pair]) -> Sequence[str]:
        """What is judged."""
        return tuple(self.policy.margins)

    def findings(self, valid: Sequence[Pair]) -> list[Finding]:
        """What the valid pairs say of each gated metric that every one of them measured."""
        if len(valid) < FEWEST_PAIRS:
            return []
        measured = [name for name in self.names(valid) if all(pair.compares(name) for pair in valid)]
        margins = {
            name: self.policy.margin(name, float(np.median([pair.values[name][0] for pair in valid])))
            for name in measured
        }
        return judge({name: differences(valid, name) for name in measured}, margins) if measured else []

    def next_pair(self, pairs: Sequence[Pair]) -> Pair:
        """Run the pair after these, or take it from the disk where it was finished before."""
        index = len(pairs)
        seed, arms = self._seed(index), self._order(pairs)
        check = self.policy.check == "every" or not any(pair.checked for pair in pairs)
        where, runs = self._runs([arm if check else unchecked(arm) for arm in arms], index, seed)
        self.fingerprint = self.fingerprint or fingerprint(runs[arms[0].name].record)
        self.differs = self.differs or incomparable(runs, self.fingerprint)
        self.soft |= {name: fingerprint(run.record).soft for name, run in runs.items()}
        pair = make_pair(index, seed, (arms[0].name, arms[1].name), runs, self.policy, check)
        self.tell(f"pair {index + 1}: {f'void: {pair.void[0]}' if pair.void else 'valid'}")
        if not pair.void:
            block = len(self.listed) // 2
            for arm in arms:
                path, uuid = f"pairs/{where.name}/{arm.name}", str(runs[arm.name].record.run.get("uuid"))
                self.listed.append(Listed(path, arm.name, block, seed, uuid))
        return pair

    def _seed(self, index: int) -> int:
        return self.policy.seed + index

    def _order(self, pairs: Sequence[Pair]) -> tuple[Arm, Arm]:
        """Turning with every valid pair."""
        forward = sum(not pair.void for pair in pairs) % 2 == 0
        return (self.baseline, self.candidate) if forward else (self.candidate, self.baseline)

    def _runs(self, arms: Sequence[Arm], index: int, seed: int) -> tuple[Path, Mapping[str, Observation]]:
        """Both runs and their folder; half a pair is run again as a whole: its runs must be neighbours."""
        attempt = 0
        while (where := self.out / "pairs" / f"{index:02d}{f'-again-{attempt}' * (attempt > 0)}").exists():
            stored = {arm.name: _stored(where / arm.name) for arm in arms}
            found = {name: run for name, run in stored.items() if run is not None}
            if len(found) == len(arms):
                return where, found
            attempt += 1
        where.mkdir(parents=True)
        return where, {
            arm.name: Observation.read(self.measure(arm, self.policy, seed, where / arm.name)) for arm in arms
        }

    def claim(self) -> None:
        """Write down what this directory gates; HarnessError where it holds another gate."""
        plan = {
            "policy": asdict(self.policy),
            "arms": {arm.name: arm.describe() for arm in (self.baseline, self.candidate)},
            "host": hashlib.sha256(platform.node().encode()).hexdigest()[:12],
        }
        plan = json.loads(json.dumps(redacted(plan)))
        file = self.out / PLAN_FILE
        if file.is_file():
            try:
                theirs = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                theirs = {}
            if odd := next((key for key in plan if theirs.get(key) != plan[key]), None):
                raise HarnessError(
                    f"{shown(str(self.out))} holds a gate with another {odd} and cannot go on as this one; "
                    "choose another --out or remove it."
                )
            return
        self.out.mkdir(parents=True, exist_ok=True)
        if any(self.out.iterdir()):
            raise HarnessError(
                f"{shown(str(self.out))} is not empty and holds no gate; choose another --out."
            )
        partial = file.with_name(f".{PLAN_FILE}.partial")
        partial.write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
        partial.replace(file)

    def _outcome(self, pairs: list[Pair], end: End) -> Outcome:
        valid = [pair for pair in pairs if not pair.void]
        return conclude(
            Outcome(
                self.policy,
                (self.baseline, self.candidate),
                tuple(pairs),
                tuple(end.findings),
                end.verdict,
                end.reason,
                tuple(n for n in self.names(valid) if not all(pair.compares(n) for pair in valid)),
                self.fingerprint,
                floors=tuple(end.floors),
                soft=self.soft,
            )
        )


def differences(valid: Sequence[Pair], metric: str) -> Floats:
    """ln(candidate / baseline) of a metric a pair, oriented so that + is worse."""
    return np.array([gated(metric).difference(*pair.values[metric]) for pair in valid])


def _stored(where: Path) -> Observation | None:
    """A run that was finished before and is as it was written; None = run it again."""
    try:
        directory = RunDirectory.open(where)
        found = Observation.read(directory)
        whole = not any(digest_problems(directory, found.record))
        return found if found.finished and whole else None
    except ReportError:
        return None  # not there, or cut short
